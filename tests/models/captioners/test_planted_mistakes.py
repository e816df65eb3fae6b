"""Named mistakes of the faster paths, planted one at a time, turn the comparison with plain passes red."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.models import families
from uae.models.captioners.features import ImageFeatures
from uae.models.captioners.policy import CaptionPolicy, Prefix
from uae.models.finetune import Full
from uae.types import Sampling

GROUP = 12


def compare() -> None:
    """Draw captions that end at different times, take an optimizer step, and score them as plain passes without any memory do."""
    captioner = families.create("qwen2_5_vl")
    Full(".*").attach(captioner.learner, keep_reference=False)
    network = captioner.learner.network
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 24, width, generator=generator) for width in (24, 40, 24)]
    rollout = captioner.sample(captioner.prepare(images), GROUP, Sampling(1.0, 40), range(3 * GROUP))
    lengths = rollout.mask_RS.sum(1)
    assert (lengths < lengths.max()).sum() > 12  # or no row would leave the batch
    with torch.no_grad():
        plain = replace(rollout, context=captioner.prepare(images))
        close(captioner.logprobs(plain), rollout.logp_RS)
        close(captioner.logprobs(rollout.of([2, 0], GROUP)), captioner.logprobs(plain.of([2, 0], GROUP)))
    captioner.logprobs(plain).sum().backward()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
    optimizer.step()
    with torch.no_grad():
        close(captioner.logprobs(rollout), captioner.logprobs(replace(rollout, context=captioner.prepare(images))))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_source_is_green():
    compare()


def frozen_towers(patch):
    """Features are kept, though the tower learns."""
    patch.setattr(CaptionPolicy, "tower_learns", False)


def features_out_of_order(patch):
    """Images that are asked for in another order get features in the order of before."""
    patch.setattr(CaptionPolicy, "tower_learns", False)
    honest = ImageFeatures.index
    patch.setattr(ImageFeatures, "index", lambda self, images: honest(self, sorted(images)))


def cache_of_rows_that_left(patch):
    """Rows leave the batch, and their keys and values stay in the cache."""
    honest = Prefix.keep

    def keep(self, rows_R):
        rows_R = torch.arange(len(rows_R), device=rows_R.device)
        honest(self, rows_R)

    patch.setattr(Prefix, "keep", keep)


def rows_in_another_order(patch):
    """What stays in the batch is turned around in the cache alone."""
    honest = Prefix.keep
    patch.setattr(Prefix, "keep", lambda self, rows_R: honest(self, rows_R.flip(0)))


def mask_of_rows_that_left(patch):
    """The cache follows, the mask of the prompts does not."""
    honest = Prefix.keep

    def keep(self, rows_R):
        mask_NP = self.mask_NP
        honest(self, rows_R)
        self.mask_NP = mask_NP[: len(rows_R)]

    patch.setattr(Prefix, "keep", keep)


@pytest.mark.parametrize(
    "plant",
    [frozen_towers, features_out_of_order, cache_of_rows_that_left, rows_in_another_order, mask_of_rows_that_left],
    ids=lambda plant: plant.__name__,
)
def test_a_planted_mistake_is_red(plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        compare()
