"""Captions are drawn token by token: what has ended leaves the batch, the cache grows in place, and no number changes."""

import pytest
import torch

from tests.models import families
from uae.models.captioners import fixed_cache
from uae.models.captioners.policy import CaptionPolicy
from uae.types import Sampling

TOLERANCE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture
def batches(monkeypatch):
    """Numbers of rows that the text layers were given, one per pass."""
    seen, honest = [], CaptionPolicy.advance
    monkeypatch.setattr(CaptionPolicy, "advance", lambda *a: seen.append(len(a[2])) or honest(*a))
    return seen


@pytest.mark.parametrize("family", families.FAMILIES)
def test_rows_that_have_ended_leave_the_batch(family, batches, monkeypatch):
    captioner = families.create(family)
    batches.clear()
    generator = torch.Generator().manual_seed(0)
    context = captioner.prepare([torch.rand(3, 24, width, generator=generator) for width in (24, 40, 24)])
    drawn = captioner.sample(context, 8, Sampling(1.0, 90), range(24))
    lengths = drawn.mask_RS.sum(1)
    assert lengths.min() < lengths.max()
    assert batches[0] == 24 > batches[-1]
    assert sum(batches) < 24 * len(batches)
    with torch.no_grad():  # row by row, each token is what teacher forcing gives
        torch.testing.assert_close(captioner.logprobs(drawn), drawn.logp_RS, **TOLERANCE)
    for row in (0, 11, 23):
        alone = captioner.sample(context.index([row // 8]), 1, Sampling(1.0, 90), [row])
        length = alone.tokens_NT.shape[1]
        assert torch.equal(drawn.tokens_NT[row, :length], alone.tokens_NT[0])
        assert (drawn.tokens_NT[row, length:] == captioner.pad_id).all()
        torch.testing.assert_close(drawn.entropy_RS[row, :length], alone.entropy_RS[0], **TOLERANCE)
    assert drawn.tokens_NT.shape[1] == int(lengths.max()) < 90  # shorter than allowed
    for values in (drawn.tokens_NT, drawn.mask_RS, drawn.logp_RS, drawn.entropy_RS):
        assert values.is_contiguous()
    for values in (drawn.logp_RS, drawn.entropy_RS):
        assert (values[drawn.mask_RS == 0] == 0).all()


def test_what_is_drawn_is_written_into_the_cache_and_not_copied(monkeypatch):
    """The keys of a step lie where those of the step before lay."""
    places = []
    captioner = families.create("qwen2_5_vl")
    captioner.end_ids = []
    update = fixed_cache.FixedLayer.update

    def watched(layer, *args, **kwargs):
        keys, values = update(layer, *args, **kwargs)
        places.append((id(layer), keys.data_ptr()))
        return keys, values

    monkeypatch.setattr(fixed_cache.FixedLayer, "update", watched)
    captioner.sample(captioner.prepare(torch.rand(1, 3, 24, 24)), 2, Sampling(1.0, 20), range(2))
    assert len(places) > 30
    assert len(set(places)) == len({layer for layer, _ in places}) == 2


def test_logits_of_the_sampler_are_those_of_training_code():
    """In bfloat16, too: both accumulate in float32, and neither is rounded."""
    captioner = families.create("qwen2_5_vl")
    network = captioner.learner.network.bfloat16()
    hidden_ND = torch.randn(5, network.base.get_output_embeddings().weight.shape[1], dtype=torch.bfloat16)
    logp_NV = network.output_layer(0.7)(hidden_ND).log_softmax(-1)
    assert logp_NV.dtype == torch.float32
    words = torch.arange(logp_NV.shape[1])
    for n in range(5):
        scored_V = network.score(hidden_ND[n].expand(len(words), -1), words, 0.7)
        torch.testing.assert_close(scored_V, logp_NV[n], atol=1e-5, rtol=0)
    assert (logp_NV.bfloat16().float() - logp_NV)[logp_NV.isfinite()].abs().max() > 1e-3
