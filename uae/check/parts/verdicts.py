"""What a check found: a number, the bound that it is held against, and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Verdict = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Found:
    """What one check found.

    Args:
        verdict: Whether the number is within its bound, or "not applicable" if there was nothing to measure.
        measured: The number; NaN where there is none.
        bound: The bound as text, such as "<= 1e-05".
        reason: Why the check failed or is not applicable; empty where the number says it all.
    """

    verdict: Verdict
    measured: float = float("nan")
    bound: str = ""
    reason: str = ""


class Check(NamedTuple):
    """A check that has not been run: its name, as the table shows it, and the function that measures."""

    name: str
    measure: Callable[[], Found]


def at_most(measured: float | Tensor, bound: float, reason: str = "") -> Found:
    """Passed if the number is not above the bound. ``reason`` is shown if it is, or is NaN."""
    number = float(measured)
    passed = number <= bound
    return Found("passed" if passed else "failed", number, f"<= {bound:g}", "" if passed else reason)


def at_least(measured: float | Tensor, bound: float, reason: str = "") -> Found:
    """Passed if the number is not below the bound. ``reason`` is shown if it is, or is NaN."""
    number = float(measured)
    passed = number >= bound
    return Found("passed" if passed else "failed", number, f">= {bound:g}", "" if passed else reason)


def not_applicable(reason: str) -> Found:
    """Nothing was measured, for this reason."""
    return Found("not applicable", reason=reason)


def ratio_gap(logp_RS: Tensor, old_logp_RS: Tensor, mask_RS: Tensor) -> Tensor:
    """Largest |ratio - 1| between two computations of the log-probs of the same actions, where the mask is 1."""
    gap_RS = ((logp_RS - old_logp_RS).exp() - 1).abs()
    return torch.where(mask_RS.bool(), gap_RS, 0.0).max()


@dataclass(frozen=True)
class Precision:
    """The bounds that rounding sets.

    Args:
        exact: Whether everything is computed in float32 or better.
    """

    exact: bool

    @property
    def name(self) -> str:
        """How the table calls it."""
        return "float32" if self.exact else "16 bits"

    @property
    def ratio(self) -> float:
        """Largest |ratio - 1| of two computations of one policy in different batches."""
        return 1e-4 if self.exact else 0.1

    @property
    def same(self) -> float:
        """Largest |ratio - 1| of two computations in batches of the same shape."""
        return 1e-5 if self.exact else 1e-2

    @property
    def pixels(self) -> float:
        """Largest mean absolute difference of the pixels of one image, drawn in different batches."""
        return 1e-3 if self.exact else 0.05
