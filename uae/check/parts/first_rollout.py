"""What is looked at in brief on the first rollout of every run: one caption again, without the others beside it.

The row costs one more caption to score and at most one more image to draw. ``python -m uae.check`` looks at everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from uae.check.parts import guidance
from uae.check.parts.changed_actions import alone, lengths
from uae.check.parts.renderers import asked_size, difference, misshapen, out_of_range
from uae.check.parts.verdicts import Found, at_most, ratio_gap
from uae.check.parts.weights import precision_of
from uae.rollout import Experience, Plan, noise_seeds
from uae.types import UMM, Rollout

KEY = "check_first_rollout"


@runtime_checkable
class RollsOut(Protocol):
    """A LightningModule that learns from rollouts, as `uae.module.UnifiedGRPO` does."""

    experience: Experience | None
    plan: Plan
    ratio_tolerance: float

    @property
    def umm(self) -> UMM:
        """The system that it trains."""
        ...

    def whole_policies(self) -> AbstractContextManager[None]:
        """Inside, every rank holds the whole weights of both policies."""
        ...


class FirstRollout(Callback):
    """Stops a new run whose first rollout has images of a wrong size, rows that depend on their batch, or doubled guidance.

    It looks before the first backward pass, when the weights are still those of the rollout.
    """

    def __init__(self) -> None:
        self._done = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the first rollout of a new run.

        Raises:
            RuntimeError: Something is wrong on this or another rank.
        """
        if self._done or trainer.global_step or not isinstance(pl_module, RollsOut) or pl_module.experience is None:
            return
        self._done = True
        with trainer.precision_plugin.forward_context(), torch.no_grad(), pl_module.whole_policies():
            problem = fault(pl_module.umm, pl_module.plan, pl_module.experience, pl_module.ratio_tolerance)
        if not trainer.strategy.reduce_boolean_decision(problem is None, all=True):
            raise RuntimeError(
                f"the first rollout is wrong: {problem or 'see the error of another process'}; python -m uae.check with the same "
                f"configuration shows all of it, --{KEY} false starts anyway"
            )


def fault(umm: UMM, plan: Plan, experience: Experience, tolerance: float) -> str | None:
    """The first thing that is wrong in the first rollout of a run, with its number; None if nothing is.

    Args:
        umm: The system, with the weights of the rollout.
        plan: Settings of the rollout.
        experience: The rollout.
        tolerance: Largest |ratio - 1| between a caption, or the actions of an image, alone and in the batch.
    """
    for found in _looked_at(umm, plan, experience, tolerance):
        if found.verdict == "failed":
            return f"{found.reason} ({found.measured:.3g}, allowed: {found.bound})"
    return None


def _looked_at(umm: UMM, plan: Plan, experience: Experience, tolerance: float) -> Iterator[Found]:
    rollout, drawn_NCHW = experience.rollout, experience.reconstructions_NCHW
    size = asked_size(umm.renderer)
    wanted = len(rollout) * plan.reconstructions, 3, *(size or ("H", "W"))
    yield at_most(misshapen(drawn_NCHW, wanted[0], size), 0, f"images are {tuple(drawn_NCHW.shape)}, not {wanted}")
    yield at_most(out_of_range(drawn_NCHW), 0, "pixels are outside [0, 1], or NaN")
    length_R = lengths(rollout.mask_RS)
    row = length_R.index(min(length_R))  # the one with the most padding
    one, place = alone(rollout, row), row * plan.reconstructions
    if "caption" in experience.segments:
        logp_RS = rollout.logp_RS[row : row + 1, : one.mask_RS.shape[1]]
        gap = ratio_gap(umm.captioner.logprobs(one), logp_RS, one.mask_RS)
        yield at_most(gap, tolerance, "log-probs of a caption depend on the captions beside it")
    yield from _drawn_again(umm, plan, experience, place, one, tolerance)


def _drawn_again(umm: UMM, plan: Plan, experience: Experience, place: int, one: Rollout[Any], tolerance: float) -> Iterator[Found]:
    """What is drawn of one caption, whose first image has this place among all: its pixels, or its actions if they train."""
    image, taken = experience.segments.get("image"), None
    if image is not None:
        taken = image.actions.of([place], 1)
        gap = ratio_gap(image.policy.logprobs(taken), taken.logp_RS, taken.mask_RS)
        yield at_most(gap, tolerance, "log-probs of an image depend on the images beside it")
    elif umm.image_policy is not None or not umm.renderer.modules():
        return  # tokens of a single image take as long as those of all; or the renderer is outside this process
    condition, precision = umm.conditioner.encode(one.texts, one), precision_of(umm)
    yield guidance.value(umm.renderer, condition, precision, taken)
    if image is None and not experience.redrawn:
        image_CHW = umm.renderer.render(condition, [noise_seeds(plan, experience.id_B.tolist(), 0)[place]])[0]
        gap_of_pixels = difference(image_CHW, experience.reconstructions_NCHW[place])
        yield at_most(gap_of_pixels, precision.pixels, "pixels of an image depend on the captions beside it")
