"""Checks of a renderer whose actions have log-probs: image tokens, or denoising steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from uae.check.parts import guidance
from uae.check.parts.changed_actions import changed_from, middles
from uae.check.parts.renderers import Pictures
from uae.check.parts.verdicts import Check, Found, Precision, at_most, not_applicable, ratio_gap
from uae.seeds import seed_of
from uae.types import ImagePolicy, Trajectory


@dataclass
class PictureActions:
    """An image policy and what it draws from.

    Args:
        policy: The policy under test.
        pictures: The captions that it draws.
        precision: What it computes in.
    """

    policy: ImagePolicy[Any]
    pictures: Pictures
    precision: Precision

    @property
    def condition(self) -> Any:
        """What it draws from, N rows."""
        return self.pictures.condition

    @cached_property
    def taken(self) -> Any:
        """The actions that the checks are about."""
        return self.drawn("first")

    @torch.no_grad()
    def drawn(self, name: str) -> Any:
        """One row of actions per row of the condition."""
        return self.policy.sample(self.condition, [seed_of("check", name, "actions", row) for row in range(len(self.condition))])

    def checks(self) -> list[Check]:
        """All checks of an image policy but the ratio, which is measured in several precisions."""
        return [
            Check("picture actions: causality", self.causality),
            Check("picture actions: batch", self.batch),
        ]

    @torch.no_grad()
    def ratio(self, precision: Precision | None = None) -> Found:
        """Log-probs of training code against those of the sampler."""
        taken = self.drawn("ratio")
        gap, precision = ratio_gap(self.policy.logprobs(taken), taken.logp_RS, taken.mask_RS), precision or self.precision
        rounded = 1.0 if precision.exact else guidance.scale(self.policy)  # guidance multiplies what rounding does to c - u
        return at_most(gap, precision.ratio * rounded, "|ratio - 1| of sampler and training code")

    @torch.no_grad()
    def causality(self) -> Found:
        """Other actions in the second half of an image leave the log-probs of the first half as they are."""
        taken = self.taken
        if not isinstance(taken, Trajectory):
            return not_applicable(f"{type(taken).__name__} is no Trajectory, so its actions are unknown")
        first_R = middles(taken.mask_RS)
        actions_RS = changed_from(taken.actions_RS, taken.mask_RS, first_R)
        if taken.mask_RS.shape[1] < 2 or torch.equal(actions_RS, taken.actions_RS):
            return not_applicable("images of one action, or of one token repeated")
        before, after = (self.policy.logprobs(one) for one in (taken, replace(taken, actions_RS=actions_RS)))
        at_S = torch.arange(before.shape[1], device=before.device)
        earlier_RS = taken.mask_RS * (at_S < first_R[:, None]).to(taken.mask_RS.device)
        return at_most(ratio_gap(after, before, earlier_RS), self.precision.same, "later actions change earlier log-probs")

    @torch.no_grad()
    def batch(self) -> Found:
        """A row of actions alone has the log-probs that it has beside others, in any order."""
        taken, rows = self.taken, len(self.condition)
        together_RS = self.policy.logprobs(taken)
        turned = list(reversed(range(rows)))
        parts = [turned, [0], [rows - 1]]
        gaps = [ratio_gap(self.policy.logprobs(taken.of(part, 1)), together_RS[part], taken.mask_RS[part]) for part in parts]
        rounded = 1.0 if self.precision.exact else guidance.scale(self.policy)
        return at_most(torch.stack(gaps).max(), self.precision.ratio * rounded, "log-probs of an image depend on the images beside it")
