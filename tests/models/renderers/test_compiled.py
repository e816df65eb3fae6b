"""Compiled denoisers against the same ones uncompiled, traced by the real front end and run without code generation."""

import pytest
import torch
from torch import nn

from tests.models.pipelines.pipeline_cases import CLOSE, FLOAT32, SEEDS, SIDE, load, ragged
from uae.models.finetune import Full, LoRA
from uae.models.flow.policy import FlowPolicy
from uae.models.pipelines.contracts import denoiser_of
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.rendering import Rendering, compile_blocks

BLOCKS = {"sd3": 2, "flux": 2, "sana": 1, "qwen_image": 1, "sdxl": 4}
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the front end looks at it on inputs of blocks


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """How compilation was asked for, once per block."""
    torch.compiler.reset()
    asked, compiled = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **named: asked.append(named) or compiled(f, backend="eager", **named))
    return asked


def create(name, compiled, **settings):
    settings = {"steps": 3, "placement": FLOAT32, **settings}
    negative = ragged(name, [7], seed=1) if settings.get("guidance", 1) > 1 else None
    return DiffusersRenderer(load(name), Rendering(SIDE, SIDE, compile=compiled, **settings), negative)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_compiled_for_any_size_and_length(name, asked):
    compiled, plain = create(name, True), create(name, False)
    assert asked == [{"dynamic": True}] * BLOCKS[name]
    assert denoiser_of(compiled.pipe)._compiled_call_impl is None  # not the network as a whole
    for lengths in ([5, 2], [9, 4, 6]):
        condition = ragged(name, lengths)
        images = compiled.render(condition, SEEDS[: len(lengths)])
        torch.testing.assert_close(images, plain.render(condition, SEEDS[: len(lengths)]), **CLOSE)


def test_rows_that_are_left_out_are_another_size():
    compiled, plain = (create("sd3", on, guidance=2.0, guidance_interval=(0.0, 0.5)) for on in (True, False))
    condition = ragged("sd3")
    torch.testing.assert_close(compiled.render(condition, SEEDS), plain.render(condition, SEEDS), **CLOSE)


def updated(policy, trajectory):
    """Log-probs, their gradients, and log-probs under other weights, inside and outside the reference."""
    network = policy.learner.network
    logp_NS = policy.logprobs(trajectory)
    logp_NS.sum().backward()
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    grads = [weight.grad.clone() for weight in trained.values() if weight.grad is not None]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        moved = policy.logprobs(trajectory)
        with policy.learner.reference():
            start = policy.logprobs(trajectory)
    return [logp_NS.detach(), moved, start, *grads]


@pytest.mark.parametrize(("name", "checkpointing"), [("sd3", False), ("flux", True)])
@pytest.mark.parametrize("finetune", [LoRA(2), Full(trainable=".")], ids=["lora", "full"])
def test_a_compiled_denoiser_learns_and_keeps_its_start(name, checkpointing, finetune):
    policies = [FlowPolicy(create(name, on)) for on in (True, False)]
    trajectory, found = policies[0].sample(ragged(name), SEEDS), []
    for policy in policies:
        torch.manual_seed(0)
        finetune.attach(policy.learner, keep_reference=True)
        policy.learner.network.gradient_checkpointing = checkpointing
        found.append(updated(policy, trajectory))
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    logp_NS, moved, start = found[0][:3]
    torch.testing.assert_close(start, logp_NS, **CLOSE)
    assert (moved - start).abs().max() > 1e-3


def test_a_denoiser_without_blocks_is_refused():
    key = "model.init_args.system.init_args.rendering.compile"
    with pytest.raises(ValueError, match=rf"^Linear has no blocks .*; set {key} to false$"):
        compile_blocks(nn.Linear(2, 2))
