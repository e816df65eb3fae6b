"""Compiled decoding steps draw what plain ones draw: the same tokens, the same log-probs."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.models import families
from tests.models.tokens.x_omni_cases import tiny_x_omni
from uae.models.captioners import steps
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.loading import Reading, assemble_captioner
from uae.models.finetune import LoRA
from uae.models.tokens import emu3, janus
from uae.models.tokens.policy import TokenSampling
from uae.rehearsal.emu3 import emu3 as tiny_emu3
from uae.rehearsal.janus import janus_pro as tiny_janus_pro
from uae.types import Sampling

UNIFY = {
    "janus": lambda: janus.unify(HFCaptioner(*tiny_janus_pro(2, seed=0), "Describe."), TokenSampling(5.0)),
    "emu3": lambda: emu3.unify(HFCaptioner(*tiny_emu3(seed=0), "Describe."), 32, 40, TokenSampling(5.0)),
    "x_omni": lambda: tiny_x_omni(TokenSampling(5.0)),
}


@pytest.fixture
def traced(monkeypatch):
    """Steps are traced as for compilation, which finds every new size, but are run without generated code."""
    seen = []

    def step(network, arguments):
        inputs = arguments.get("input_ids", arguments.get("inputs_embeds"))
        seen.append((tuple(inputs.shape), arguments["attention_mask"].shape[-1]))
        return compiled(network, arguments)

    compiled = torch.compile(steps._step, dynamic=False, backend="eager")
    monkeypatch.setattr(steps, "_compiled", lambda device: step)
    return seen


def drawn(captioner, compiled):
    network = captioner.learner.network
    network.compile_steps = compiled
    context = captioner.prepare([torch.rand(3, 24, w, generator=torch.Generator().manual_seed(0)) for w in (24, 40)])
    rollout = captioner.sample(context, 8, Sampling(1.0, 40), range(16))
    return rollout.tokens_NT, rollout.logp_RS, rollout.entropy_RS


@pytest.mark.parametrize("family", families.FULL_ATTENTION)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_captions_are_the_same(family, adapter, traced):
    captioner = families.create(family)
    if adapter:
        LoRA(rank=4).attach(captioner.learner, keep_reference=False)
        for name, weight in captioner.learner.network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
    plain, compiled = (drawn(captioner, asked) for asked in (False, True))
    assert torch.equal(plain[0], compiled[0])
    for before, after in zip(plain[1:], compiled[1:], strict=True):
        torch.testing.assert_close(before, after, atol=1e-5, rtol=0)
    assert len(traced) == plain[0].shape[1] - 1
    assert len(set(traced)) == 1  # one size, so one compilation


@pytest.mark.parametrize("name", UNIFY)
def test_image_tokens_are_the_same(name, traced):
    umm = UNIFY[name]()
    condition = umm.conditioner.encode(["a red ring", "a large blue square at the top left of a navy background"])
    plain = umm.renderer.sample(condition, [1, 2])
    umm.captioner.learner.network.compile_steps = True
    compiled = umm.renderer.sample(condition, [1, 2])
    assert torch.equal(plain.actions_RS, compiled.actions_RS)
    torch.testing.assert_close(plain.logp_RS, compiled.logp_RS, atol=1e-5, rtol=1e-5)  # guidance multiplies rounding by 5
    torch.testing.assert_close(plain.entropy_RS, compiled.entropy_RS, atol=1e-5, rtol=0)
    assert len(set(traced)) == 1


def test_generated_code_is_the_same():
    """Through torch's own compiler, once."""
    captioner = families.create("qwen2_5_vl")
    plain, compiled = (drawn(captioner, asked) for asked in (False, True))
    assert torch.equal(plain[0], compiled[0])
    torch.testing.assert_close(plain[1], compiled[1], atol=1e-5, rtol=0)


def test_the_key_reaches_the_policy_or_is_refused():
    model, processor = tiny_janus_pro(2, seed=0)
    umm = janus.unify(assemble_captioner(model, processor, Reading(compile=True), "Describe."), TokenSampling(5.0))
    assert umm.captioner.learner.network.compile_steps
    model.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match=r"reading.compile=true, but Janus\w* has attention 'eager'.*reading.compile to false"):
        assemble_captioner(model, processor, Reading(compile=True), "Describe.")


def test_sharded_policies_are_refused():
    class Sharded(torch.nn.Linear, FSDPModule):
        def __new__(cls, *_):  # FSDPModule's own wants weights that are sharded already
            return object.__new__(cls)

    with pytest.raises(ValueError, match="reading.compile=true, but trainer.strategy shards the policy"):
        steps.check_whole(torch.nn.Sequential(Sharded(2, 2)))


@pytest.mark.gpu
def test_graphs_are_the_same():
    """Recorded as CUDA graphs, in two rollouts one after the other, whose caches lie in different places."""
    captioner = families.create("qwen2_5_vl").to("cuda")
    plain = drawn(captioner, False)
    for _ in range(2):
        compiled = drawn(captioner, True)
        assert torch.equal(plain[0], compiled[0])
        torch.testing.assert_close(plain[1], compiled[1], atol=1e-4, rtol=0)
