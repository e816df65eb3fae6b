"""Checks of a reward: equal images score the most, rows do not depend on each other, and nothing of it can train."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from uae.check.parts.renderers import Pictures
from uae.check.parts.verdicts import Check, Found, Precision, at_most, not_applicable
from uae.check.parts.weights import modules_of
from uae.rewards import BaseReward, RandomReward

SCORES = {True: 1e-4, False: 1e-2}  # largest difference that rounding makes, by `Precision.exact`


@dataclass
class Scores:
    """A reward and what it compares.

    Args:
        name: Name of the reward in the table.
        reward: The reward under test, loaded.
        sources_BCHW: Images.
        pictures: What was drawn of them; N = B * G rows.
        precision: What the reward computes in.
    """

    name: str
    reward: BaseReward
    sources_BCHW: Tensor
    pictures: Pictures
    precision: Precision

    @property
    def drawn_NCHW(self) -> Tensor:  # noqa: N802 (a shape)
        """The N images."""
        return self.pictures.images_NCHW

    @property
    def texts(self) -> list[str]:
        """Their captions."""
        return self.pictures.captions.texts

    @cached_property
    def reward_BG(self) -> Tensor:  # noqa: N802 (a shape)
        """What it says of all rows in one call."""
        return self.reward(self.sources_BCHW, self.drawn_NCHW, self.texts)

    def checks(self) -> list[Check]:
        """All checks of a reward."""
        return [
            Check(f"reward {self.name}: identity", self.identity),
            Check(f"reward {self.name}: range", self.range),
            Check(f"reward {self.name}: batch", self.batch),
            Check(f"reward {self.name}: frozen", self.frozen),
        ]

    def identity(self) -> Found:
        """Nothing scores more than the source itself: not what was drawn, nor noise, nor another source."""
        if isinstance(self.reward, RandomReward):
            return not_applicable("it is random on purpose")
        images, group = len(self.sources_BCHW), len(self.texts) // len(self.sources_BCHW)
        if not self._compares(group):
            return not_applicable("it does not compare images with their sources")
        noise = torch.rand(self.drawn_NCHW.shape, generator=torch.Generator().manual_seed(0)).to(self.drawn_NCHW)
        same_NCHW = self.sources_BCHW.repeat_interleave(group, dim=0)
        best_BG = self.reward(self.sources_BCHW, same_NCHW, self.texts)
        others = [self.reward_BG, self.reward(self.sources_BCHW, noise, self.texts)]
        if images > 1:
            others.append(self.reward(self.sources_BCHW, same_NCHW.roll(group, 0), self.texts))
        lead = (torch.stack(others).nan_to_num(-torch.inf) - best_BG).max()
        return at_most(lead.clamp(min=0), SCORES[self.precision.exact], "another image scores more than the source itself")

    def _compares(self, group: int) -> bool:
        """Whether scores change with the sources and with what was drawn."""
        other_BCHW = 1 - self.sources_BCHW
        by_source_BG = self.reward(other_BCHW, self.drawn_NCHW, self.texts)
        by_drawn_BG = self.reward(self.sources_BCHW, other_BCHW.repeat_interleave(group, dim=0), self.texts)
        here_BG = self.reward_BG.nan_to_num()
        return not any(torch.equal(one.nan_to_num(), here_BG) for one in (by_source_BG, by_drawn_BG))

    def range(self) -> Found:
        """A finite float32 number for every row, in the shape ``[B, G]``."""
        shape = len(self.sources_BCHW), len(self.texts) // len(self.sources_BCHW)
        if tuple(self.reward_BG.shape) != shape or self.reward_BG.dtype != torch.float32:
            return at_most(len(self.texts), 0, f"{self.reward_BG.dtype} {list(self.reward_BG.shape)}, not float32 {list(shape)}")
        return at_most(int((~self.reward_BG.isfinite()).sum()), 0, "rows whose reward is no finite number")

    def batch(self) -> Found:
        """Every image alone, and all in another order, get the rewards that they have together."""
        if isinstance(self.reward, RandomReward):
            return not_applicable("it is random on purpose")
        images, group = len(self.sources_BCHW), len(self.texts) // len(self.sources_BCHW)
        parts = [[image] for image in range(images)] + [list(reversed(range(images)))]
        gaps = []
        for part in parts:
            rows = [image * group + row for image in part for row in range(group)]
            again_BG = self.reward(self.sources_BCHW[part], self.drawn_NCHW[rows], [self.texts[row] for row in rows])
            both_missing = again_BG.isnan() & self.reward_BG[part].isnan()
            gap_BG = (again_BG - self.reward_BG[part]).nan_to_num(torch.inf).abs()
            gaps.append(gap_BG.masked_fill(both_missing, 0.0).max())
        return at_most(torch.stack(gaps).max(), SCORES[self.precision.exact], "a reward depends on the rows beside it")

    def frozen(self) -> Found:
        """No reward has a gradient, no weight can train, and every network is in eval mode."""
        reward_BG = self.reward(self.sources_BCHW, self.drawn_NCHW.detach().requires_grad_(), self.texts)
        networks = modules_of(self.reward)
        loose = sum(network.training + any(p.requires_grad for p in network.parameters()) for network in networks)
        return at_most(int(reward_BG.requires_grad) + loose, 0, "gradients, or networks that train or are not in eval mode")
