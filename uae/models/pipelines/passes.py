"""Leaves rows of the negative pass out where their result is known. The pipeline gets the rows back, and notices nothing.

With classifier-free guidance a pipeline computes ``negative + scale * (positive - negative)``. A negative row that is given the
result of its positive row makes this the positive row exactly, and a negative row that is given the result of an equal row stays
what it was. So neither the pipeline's loop nor its solver's memory changes, and gradients are those of the formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Interval = tuple[float, float]


def guided_at(step: int, steps: int, interval: Interval) -> bool:
    """Whether guidance is applied in a step, the first of which is 0: its share ``step / steps`` is in [low, high)."""
    return interval[0] <= min(step, steps - 1) / steps < interval[1]  # PNDM predicts once more than it has steps


@dataclass(frozen=True)
class NegativePass:
    """Which rows of one call of a pipeline with guidance are computed. A step has N negative rows, then N positive ones.

    Args:
        rows: N.
        steps: Number of denoising steps of the whole way from noise to image.
        interval: Share of the steps in which guidance is applied; None is all of them.
        first: Number of the step that the call begins with.
        seeds: N seeds of the noise that the call begins with: rows of one seed have equal noise. None where the latents have
            no seeds, because they come from elsewhere.
    """

    rows: int
    steps: int
    interval: Interval | None = None
    first: int = 0
    seeds: Sequence[int] | None = None

    def sources(self, call: int) -> list[int]:
        """For each of the 2 N rows of the denoiser's call of this number, the row whose result it gets."""
        positive = list(range(self.rows, 2 * self.rows))
        if self.interval is not None and not guided_at(self.first + call, self.steps, self.interval):
            return positive * 2
        if call == 0 and self.seeds is not None:
            return [self.seeds.index(seed) for seed in self.seeds] + positive
        return [*range(self.rows), *positive]


@contextmanager
def leaving_out(denoiser: nn.Module, negative: NegativePass) -> Iterator[None]:
    """Inside, the denoiser computes only those rows of each call that `NegativePass.sources` names.

    Args:
        denoiser: The network that a pipeline calls once per step, with all rows.
        negative: What is left out in one call of the pipeline.
    """
    calls: list[list[int]] = []

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        calls.append(negative.sources(len(calls)))
        kept = sorted(set(calls[-1]))
        return None if len(kept) == 2 * negative.rows else _selected((arguments, named), kept, 2 * negative.rows)

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        kept = sorted(set(calls[-1]))
        return None if len(kept) == 2 * negative.rows else _selected(output, [kept.index(row) for row in calls[-1]], len(kept))

    hooks = denoiser.register_forward_pre_hook(before, with_kwargs=True), denoiser.register_forward_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _selected(values: Any, rows: list[int], count: int) -> Any:
    """The same arguments or outputs with some of their rows; what has not ``count`` rows is for all rows together."""
    if isinstance(values, Tensor):
        return values[rows] if values.ndim and len(values) == count else values
    if isinstance(values, dict):
        return {name: _selected(value, rows, count) for name, value in values.items()}
    return tuple(_selected(value, rows, count) for value in values) if isinstance(values, tuple) else values
