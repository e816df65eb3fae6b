"""Checks of a captioner: its log-probs are those of its sampler, and a caption depends on its image and its seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from uae.check.parts.changed_actions import alone, changed_from, cut_short, lengths, middles
from uae.check.parts.verdicts import Check, Found, Precision, at_least, at_most, not_applicable, ratio_gap
from uae.models.captioners.policy import CaptionPolicy
from uae.seeds import seed_of
from uae.types import Captioner, Rollout, Sampling

HOT = 50.0  # a temperature at which every token that is not banned is about as likely as any other


@dataclass
class Captions:
    """A captioner and what it is asked.

    Args:
        captioner: The captioner under test.
        images_BCHW: The images, in [0, 1].
        group: Captions per image.
        sampling: How captions are drawn.
        precision: What the captioner computes in.
        instruction: Question beside every image; None is the captioner's own.
    """

    captioner: Captioner[Any]
    images_BCHW: Tensor
    group: int
    sampling: Sampling
    precision: Precision
    instruction: str | None = None

    @cached_property
    def rollout(self) -> Rollout[Any]:
        """The captions that most checks are about."""
        return self.drawn(self.seeds("first"))

    def seeds(self, name: str) -> list[int]:
        """One seed per caption; another list for another name."""
        return [seed_of("check", name, row) for row in range(len(self.images_BCHW) * self.group)]

    @torch.no_grad()
    def drawn(self, seeds: Sequence[int], images: int | None = None, sampling: Sampling | None = None) -> Rollout[Any]:
        """Captions of the first ``images`` images (None is all), one per seed."""
        context = self.captioner.prepare(self.images_BCHW[:images], self.instruction)
        return self.captioner.sample(context, len(seeds) // len(context), sampling or self.sampling, seeds)

    def checks(self) -> list[Check]:
        """All checks of a captioner but the ratio, which is measured in several precisions."""
        return [
            Check("captions: causality", self.causality),
            Check("captions: padding", self.padding),
            Check("captions: order of rows", self.order),
            Check("captions: same seeds", self.same_seeds),
            Check("captions: other seeds", self.other_seeds),
            Check("captions: banned tokens", self.banned_tokens),
        ]

    @torch.no_grad()
    def ratio(self, precision: Precision | None = None) -> Found:
        """Log-probs of training code against those of the sampler."""
        rollout = self.drawn(self.seeds("ratio"))
        gap = ratio_gap(self.captioner.logprobs(rollout), rollout.logp_RS, rollout.mask_RS)
        return at_most(gap, (precision or self.precision).ratio, "|ratio - 1| of sampler and training code")

    @torch.no_grad()
    def causality(self) -> Found:
        """Other tokens in the second half of a caption leave the log-probs of its first half as they are."""
        rollout, first_R = self.rollout, middles(self.rollout.mask_RS)
        tokens_NT = changed_from(rollout.tokens_NT, rollout.mask_RS, first_R)
        if torch.equal(tokens_NT, rollout.tokens_NT):
            return not_applicable("captions of one token, or of one token repeated")
        before, after = (self.captioner.logprobs(one) for one in (rollout, replace(rollout, tokens_NT=tokens_NT)))
        at_T = torch.arange(before.shape[1], device=before.device)
        earlier_RS = rollout.mask_RS * (at_T < first_R[:, None])
        return at_most(ratio_gap(after, before, earlier_RS), self.precision.same, "later tokens change earlier log-probs")

    @torch.no_grad()
    def padding(self) -> Found:
        """A caption alone has the log-probs that it has beside longer ones, whatever tokens stand behind its end."""
        short = cut_short(self.rollout)
        together_RS, kept = self.captioner.logprobs(short), lengths(short.mask_RS)
        gaps = []
        for row in sorted({kept.index(min(kept)), kept.index(max(kept)), len(kept) - 1}):
            one = alone(short, row)
            gaps.append(ratio_gap(self.captioner.logprobs(one), together_RS[row : row + 1, : kept[row]], one.mask_RS))
        return at_most(torch.stack(gaps).max(), self.precision.ratio, "a caption alone has other log-probs than beside others")

    @torch.no_grad()
    def order(self) -> Found:
        """Images in another order have the same log-probs."""
        rollout, images = self.rollout, len(self.images_BCHW)
        if images == 1:
            return not_applicable("one image has no other order")
        backwards = list(reversed(range(images)))
        turned = rollout.of(backwards, rollout.group)
        expected_RS = self.captioner.logprobs(rollout).unflatten(0, (images, -1))[backwards].flatten(0, 1)
        gap = ratio_gap(self.captioner.logprobs(turned), expected_RS, turned.mask_RS)
        return at_most(gap, self.precision.ratio, "log-probs depend on the order of the images")

    def same_seeds(self) -> Found:
        """Captions that are drawn again are the same, whatever the global generator does, and in float32 also without others."""
        rollout, seeds = self.rollout, self.seeds("first")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("check", "global"))
            others = sum(a != b for a, b in zip(rollout.texts, self.drawn(seeds).texts, strict=True))
        if self.precision.exact:
            others += self.drawn(seeds[:1], images=1).texts != rollout.texts[:1]
        return at_most(others, 0, "captions that another call draws otherwise from the same seeds")

    def other_seeds(self) -> Found:
        """Captions of other seeds are not all the same."""
        other = self.drawn(self.seeds("second"))
        differ = sum(a != b for a, b in zip(self.rollout.texts, other.texts, strict=True))
        return at_least(differ, 1, "other seeds draw the same captions")

    @torch.no_grad()
    def banned_tokens(self) -> Found:
        """No banned token is drawn at a high temperature, and log-probs give none a probability."""
        network = self.captioner.learner.network
        if not isinstance(network, CaptionPolicy) or not len(network.banned_ids):
            return not_applicable("the captioner's network names no banned tokens")
        hot = self.drawn(self.seeds("hot"), sampling=replace(self.sampling, temperature=HOT))
        found = int((torch.isin(hot.tokens_NT, network.banned_ids.to(hot.tokens_NT.device)) & hot.mask_RS.bool()).sum())
        row = lengths(hot.mask_RS).index(max(lengths(hot.mask_RS)))
        for token in network.banned_ids[:: max(1, len(network.banned_ids) // 4)].tolist():
            one = alone(hot, row)
            one.tokens_NT[:, -1] = token  # the last one, which no later token reads
            found += int(self.captioner.logprobs(one)[0, -1].exp() > 0)
        return at_most(found, 0, "banned tokens that are drawn, or that log-probs give a probability")
