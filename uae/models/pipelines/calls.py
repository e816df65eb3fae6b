"""One call of a pipeline: what it begins with, where it ends, and what is open while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """The settings of one call of the pipeline. The defaults draw an image.

    Args:
        generators: One random generator per row for the initial noise; None if ``latents`` are given.
        latents: Latents to start from, as the denoising loop has them; None starts from noise.
        during: Function that takes the pipeline and returns a context manager, which is open during the call. The pipeline
            then has a copy of its scheduler, which may be changed.
        first: Number of the denoising step that the call begins with.
        output_type: "pt" returns pixels, "latent" returns latents and does not run the autoencoder.
    """

    generators: list[torch.Generator] | None
    latents: Tensor | None = None
    during: Callable[[Any], AbstractContextManager[None]] = nullcontext
    first: int = 0
    output_type: str = "pt"


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """One random generator per seed, on the CPU, so that the noise is the same whatever the device is."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
