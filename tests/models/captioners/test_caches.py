"""One keyword for a cache, whatever the version of transformers and whoever wrote the model."""

import warnings

import pytest
import torch
from torch import nn

from tests.models import families
from uae.models.captioners.caches import cache_argument, library_cache


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None, use_cache=None): ...


class New(nn.Module):
    def forward(self, input_ids, cache=None, use_cache=None): ...


class Passing(nn.Module):
    def forward(self, *args, **kwargs): ...


@pytest.mark.parametrize(("model", "name"), [(Old(), "past_key_values"), (New(), "cache"), (Passing(), "past_key_values")])
def test_the_signature_names_the_cache(model, name):
    assert cache_argument(model, "filled") == {name: "filled"}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_a_model_of_the_library_fills_the_cache_it_is_given_without_a_warning(family):
    model = families.create(family).learner.network.base.get_decoder()
    cache, ids = library_cache(model), torch.tensor([[1, 2, 3]])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        whole = model(input_ids=ids, use_cache=False).last_hidden_state
        model(input_ids=ids[:, :2], **cache_argument(model, cache), use_cache=True)
        last = model(input_ids=ids[:, 2:], **cache_argument(model, cache), use_cache=True).last_hidden_state
    assert cache.get_seq_length() == 3
    torch.testing.assert_close(last[:, 0], whole[:, -1], atol=1e-5, rtol=0)
