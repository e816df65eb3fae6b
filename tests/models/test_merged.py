"""An adapter as part of the weights while a policy acts: the same function, and afterwards the same bytes."""

import copy
from collections import Counter

import peft
import pytest
import torch
from torch import nn

from tests.models import families
from uae.models.finetune import LoRA
from uae.models.merged import merged
from uae.types import Sampling


def network(dtype=torch.float32, **settings):
    """Two linear layers, of which the first has an adapter that matters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **settings))
    return adapted.eval()


def kinds(model):
    return Counter(type(module).__name__ for module in model.modules())


def test_the_sum_is_the_same_function_and_leaves_no_trace():
    model, x = network(), torch.randn(5, 8)
    before, expected, state = kinds(model), model(x), copy.deepcopy(model.state_dict())
    with merged(model):
        assert kinds(model)["_Sum"] == 1
        assert kinds(model)["Linear"] < before["Linear"]
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
        with pytest.raises(KeyError), merged(model):  # nothing left to replace, and an error inside
            raise KeyError
    assert kinds(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    assert [name for name, p in model.named_parameters() if p.requires_grad]  # what trains still does


def stays(model):
    with merged(model):
        return "_Sum" not in kinds(model)


def test_what_would_not_be_the_same_is_left_alone():
    assert stays(network(torch.bfloat16))  # the sum would be rounded
    assert stays(network(use_dora=True))
    assert stays(nn.Linear(2, 2))
    two = network()
    two.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"]))
    assert not stays(two)  # the second is not at work
    two.base_model.set_adapter(["default", "other"])
    assert stays(two)
    off = network()
    with off.disable_adapter():
        assert stays(off)
    assert not stays(off)
    with torch.autocast("cpu", torch.bfloat16):  # the products would be rounded
        assert stays(off)


def test_a_layer_that_is_read_and_not_called_has_its_weights():
    """As the output layer is."""
    model = network()
    with merged(model):
        first = model.base_model.model[0]
        x = torch.randn(3, 8)
        torch.testing.assert_close(model.base_model.model[0](x), x @ first.weight.T + first.bias)
        assert not list(first.parameters())


def test_a_captioner_draws_with_the_sum_and_learns_with_the_adapter(monkeypatch):
    captioner = families.create("qwen2_5_vl")
    LoRA(rank=2).attach(captioner.learner, keep_reference=False)
    for name, parameter in captioner.learner.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.1)
    context = captioner.prepare(torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)))
    policy = captioner.learner.network
    seen, advance = [], policy.advance
    monkeypatch.setattr(policy, "advance", lambda *a: seen.append(kinds(policy)["_Sum"]) or advance(*a))
    drawn = captioner.sample(context, 4, Sampling(0.7, 8), range(8))
    assert min(seen) == 14
    assert drawn.context.features is not None
    seen.clear()
    torch.testing.assert_close(captioner.logprobs(drawn), drawn.logp_RS, atol=2e-5, rtol=0)
    assert seen == [0]
