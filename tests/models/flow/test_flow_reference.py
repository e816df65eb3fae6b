"""Diffusion policies that train, and what they started from."""

import copy

import pytest
import torch
from torch.distributions import kl_divergence

from tests.models.flow.flow_cases import (
    SEEDS,
    SIGMAS,
    STEPS,
    TEXTS,
    plain_gaussian,
    plain_transformer,
    plain_velocity,
    tiny_renderer,
    unpadded,
)
from uae.models.finetune import Full, LoRA
from uae.models.flow.policy import Exploration, FlowPolicy

CLOSE = {"atol": 1e-5, "rtol": 0}
NOISE = 0.7


@pytest.fixture
def condition(decoder):
    return decoder[0].encode(TEXTS)


@pytest.fixture
def create(decoder):
    return lambda guidance=1.0: FlowPolicy(tiny_renderer(decoder, guidance), Exploration())


@pytest.mark.parametrize(("finetune", "rate"), [(LoRA(4), 0.1), (Full(), 1e-3)], ids=["lora", "full"])
def test_an_update_moves_what_trains_and_not_the_reference(create, condition, finetune, rate):
    policy = create(4.0)
    frozen = {name: tensor.clone() for name, tensor in policy.learner.network.base.state_dict().items()}
    decoder = copy.deepcopy(policy.renderer.pipe.vae.state_dict())
    finetune.attach(policy.learner, keep_reference=True)
    trajectory = policy.sample(condition, SEEDS)
    optimizer = torch.optim.SGD([p for p in policy.learner.network.parameters() if p.requires_grad], lr=rate)
    for _ in range(3):  # an adapter starts at zero, so its first step moves one half of it only
        optimizer.zero_grad()
        policy.logprobs(trajectory).sum().backward()
        optimizer.step()
    assert (policy.logprobs(trajectory) - trajectory.logp_RS).abs().max() > 1e-4
    with policy.learner.reference(), torch.no_grad():
        torch.testing.assert_close(policy.logprobs(trajectory), trajectory.logp_RS, **CLOSE)
        assert policy.renderer.pipe.transformer is policy.learner.network
    assert (policy.logprobs(trajectory) - trajectory.logp_RS).abs().max() > 1e-4
    assert all(torch.equal(decoder[name], tensor) for name, tensor in policy.renderer.pipe.vae.state_dict().items())
    assert not any(p.requires_grad for module in policy.modules() for p in module.parameters())
    if isinstance(finetune, LoRA):
        now = {name.replace(".base_layer", ""): tensor for name, tensor in policy.learner.network.base.state_dict().items()}
        assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
        adapted = {name.split(".lora_")[0].split(".attn.")[1] for name in now if "lora_" in name}
        assert {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj"} <= adapted


def test_an_adapter_to_start_from_is_the_reference(create, condition, tmp_path):
    first = create()
    LoRA(2).attach(first.learner, keep_reference=False)
    for name, weight in first.learner.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, 0.1)
    first.learner.network.model.save_pretrained(tmp_path)
    policy = create()
    LoRA(2, adapter=str(tmp_path)).attach(policy.learner, keep_reference=True)
    trajectory = policy.sample(condition, SEEDS)
    torch.testing.assert_close(first.logprobs(trajectory).detach(), trajectory.logp_RS, **CLOSE)
    trains = {name for name, weight in policy.learner.network.named_parameters() if weight.requires_grad}
    assert trains == {name for name, _ in policy.learner.network.named_parameters() if "lora_" in name and ".default." in name}
    for name, weight in policy.learner.network.named_parameters():
        if name in trains:
            weight.data.mul_(1.5)
    with policy.learner.reference(), torch.no_grad():
        torch.testing.assert_close(policy.logprobs(trajectory), trajectory.logp_RS, **CLOSE)
    assert (policy.logprobs(trajectory) - trajectory.logp_RS).abs().max() > 1e-4
    assert trains == {name for name, weight in policy.learner.network.named_parameters() if weight.requires_grad}


def test_divergence_is_that_of_the_steps(create, condition):
    policy = create(4.0)
    Full().attach(policy.learner, keep_reference=True)
    trajectory = policy.sample(condition, SEEDS)
    assert policy.divergence(trajectory).abs().max() < 1e-9
    for weight in policy.learner.network.parameters():
        weight.data.mul_(1.05)
    found_NS = policy.divergence(trajectory)
    assert found_NS.requires_grad
    for row in range(4):
        x = trajectory.start_N[row][None]
        for i in range(STEPS - 1):
            laws = []
            for root in policy.learner.roots():
                negative = unpadded(policy.renderer.negative, 0)
                v = plain_velocity(plain_transformer(root.base), x, SIGMAS[i], unpadded(condition, row), negative, 4.0)
                laws.append(plain_gaussian(x, v, SIGMAS[i], SIGMAS[i + 1], NOISE))
            torch.testing.assert_close(found_NS[row, i], kl_divergence(*laws).mean(), rtol=1e-3, atol=1e-6)
            x = trajectory.actions_RS[row, i][None]
