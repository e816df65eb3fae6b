"""Where a frozen component lives, and in what dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Placement:
    """Memory settings of a frozen component.

    Args:
        dtype: Of its weights and its computation. "float8" stores weights in 8 bits and computes in bfloat16.
        device: E.g. "cuda:1" or "cpu"; None is wherever the policy is.
        offload: Wait on the CPU, and move to the device for as long as there is work.
    """

    dtype: Literal["float32", "bfloat16", "float16", "float8"] = "bfloat16"
    device: str | None = None
    offload: bool = False
