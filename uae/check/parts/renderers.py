"""Checks of a conditioner and a renderer: pixels are in range, and an image depends on its caption and its seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from uae.check.parts import guidance
from uae.check.parts.captioners import Captions
from uae.check.parts.changed_actions import alone, cut_short
from uae.check.parts.verdicts import Check, Found, Precision, at_least, at_most, not_applicable
from uae.models.flow.policy import FlowPolicy
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.external import ExternalRenderer
from uae.seeds import seed_of
from uae.types import UMM, ImagePolicy, Renderer, Rollout

SEEN = 1e-5  # mean absolute difference of pixels from which on two images are different ones


def asked_size(renderer: Renderer) -> tuple[int, int] | None:
    """Height and width in pixels that a renderer was told to draw; None if it does not say."""
    if isinstance(renderer, FlowPolicy):
        renderer = renderer.renderer
    if isinstance(renderer, DiffusersRenderer):
        return renderer.rendering.height, renderer.rendering.width
    return (renderer.height, renderer.width) if isinstance(renderer, ExternalRenderer) else None


def misshapen(images_NCHW: Tensor, rows: int, size: tuple[int, int] | None) -> int:
    """How many of rows, channels, height and width are not as they must be. A size of None is any."""
    found = tuple(images_NCHW.shape)
    height, width = size or found[-2:]
    return sum(a != b for a, b in zip(found, (rows, 3, height, width), strict=True)) if len(found) == 4 else 4


def out_of_range(images_NCHW: Tensor) -> float:
    """How far pixels are outside [0, 1]; NaN if some are NaN."""
    return float(torch.stack([-images_NCHW.min(), images_NCHW.max() - 1, torch.zeros(()).to(images_NCHW)]).max())


def difference(a_CHW: Tensor, b_CHW: Tensor) -> float:
    """Mean absolute difference of two images; infinite if their sizes differ."""
    return float((a_CHW.float() - b_CHW.float()).abs().mean()) if a_CHW.shape == b_CHW.shape else float("inf")


@dataclass
class Pictures:
    """A conditioner and a renderer, and the captions that they get.

    Args:
        umm: The system under test.
        asked: Captions of its captioner.
        precision: What the system computes in.
    """

    umm: UMM
    asked: Captions
    precision: Precision

    @cached_property
    def captions(self) -> Rollout[Any]:
        """Captions of different lengths."""
        return cut_short(self.asked.rollout)

    @cached_property
    @torch.no_grad()
    def condition(self) -> Any:
        """What the conditioner makes of them."""
        return self.umm.conditioner.encode(self.captions.texts, self.captions)

    @cached_property
    def images_NCHW(self) -> Tensor:  # noqa: N802 (a shape)
        """What is drawn of them."""
        return self.drawn(self.captions, self.seeds("first"))

    def seeds(self, name: str) -> list[int]:
        """One seed per caption; another list for another name."""
        return [seed_of("check", name, "picture", row) for row in range(len(self.captions))]

    @torch.no_grad()
    def drawn(self, captions: Rollout[Any], seeds: Sequence[int]) -> Tensor:
        """Images ``[N, 3, H, W]`` of captions."""
        return self.umm.renderer.render(self.umm.conditioner.encode(captions.texts, captions), seeds)

    def checks(self) -> list[Check]:
        """All checks of what is drawn."""
        return [
            Check("pictures: size", self.size),
            Check("pictures: range", self.range),
            Check("pictures: same seeds", self.same_seeds),
            Check("pictures: other seeds", self.other_seeds),
            Check("pictures: batch", self.batch),
            Check("guidance: one pass at 1", lambda: guidance.passes(self.umm.renderer, self.condition)),
            Check("guidance: value", lambda: guidance.value(self.umm.renderer, self.condition, self.precision)),
        ]

    def size(self) -> Found:
        """An image per caption, of three channels and the size that was asked for."""
        asked = asked_size(self.umm.renderer)
        wanted = f"[{len(self.captions)}, 3, {asked[0]}, {asked[1]}]" if asked else f"[{len(self.captions)}, 3, H, W]"
        return at_most(misshapen(self.images_NCHW, len(self.captions), asked), 0, f"{list(self.images_NCHW.shape)}, not {wanted}")

    def range(self) -> Found:
        """Pixels are numbers in [0, 1]."""
        return at_most(out_of_range(self.images_NCHW), 0, "pixels outside [0, 1], or NaN")

    def same_seeds(self) -> Found:
        """The same call gives the same pixels, whatever the global generator does."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("check", "global"))
            again = self.drawn(self.captions, self.seeds("first"))
        return at_most(difference(again, self.images_NCHW), SEEN, "the same captions and seeds give other pixels")

    def other_seeds(self) -> Found:
        """Every image of another seed is another one."""
        other = self.drawn(self.captions, self.seeds("second"))
        least = min(difference(a, b) for a, b in zip(other, self.images_NCHW, strict=True))
        return at_least(least, SEEN, "other seeds give the same pixels")

    def batch(self) -> Found:
        """An image alone is the image beside others, whose captions are longer or shorter."""
        if self.same_seeds().verdict != "passed":
            return not_applicable("pixels differ from call to call, see same seeds")
        if isinstance(self.umm.renderer, ImagePolicy) and not self.precision.exact:
            return not_applicable("rounded log-probs draw other actions; see picture actions: batch")
        seeds, worst = self.seeds("first"), 0.0
        for row in (0, len(seeds) - 1):
            image = self.drawn(alone(self.captions, row), [seeds[row]])[0]
            worst = max(worst, difference(image, self.images_NCHW[row]))
        return at_most(worst, self.precision.pixels, "an image alone differs from the image in a batch")
