"""Captions drawn by an engine with weights of its own: are they the policy's, whatever happens to the weights?"""

import os
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from tests.conftest import data
from tests.models.captioners import fake_vllm
from tests.models.captioners.fake_vllm import same_weights
from tests.tiny_random import RandomTiny
from uae.grpo import GRPOLoss
from uae.models.captioners.engine import EngineCaptioner, checksum, weights
from uae.models.captioners.loading import Reading, with_engine
from uae.models.captioners.vllm_engine import VLLM, VLLMEngine
from uae.models.finetune import Full, LoRA
from uae.types import Sampling

FLOAT32 = VLLM(dtype="float32")
GREEDY, WARM = Sampling(0.0, 8), Sampling(0.7, 8)
EXACT = {"atol": 1e-5, "rtol": 0}
FINETUNE = {"lora": lambda: LoRA(rank=2), "tower": lambda: LoRA(2, target_modules="all-linear"), "full": lambda: Full("")}


@pytest.fixture
def started(monkeypatch):
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def drawing(fresh, started):
    return EngineCaptioner(fresh, VLLMEngine(fresh, FLOAT32))


class Drawing:
    """The miniature with random weights, whose captions an engine draws."""

    def build(self):
        umm = RandomTiny(spread=0.025).build()
        return replace(umm, captioner=EngineCaptioner(umm.captioner, VLLMEngine(umm.captioner, FLOAT32)))


def roll(captioner, images, sampling=WARM, seeds=range(12)):
    return captioner.sample(captioner.prepare(images), len(seeds) // len(images), sampling, seeds)


def gap(captioner, rollout):
    return float((captioner.logprobs(rollout) - rollout.logp_RS).detach().abs().max())


def update(captioner, images, rate=0.02):
    """One step of SGD on random advantages; every weight that trains moves."""
    rollout = roll(captioner.captioner, images)
    trains = [p for p in captioner.learner.network.parameters() if p.requires_grad]
    (captioner.logprobs(rollout) * torch.linspace(-1, 1, 12)[:, None]).sum().backward()
    torch.optim.SGD(trains, lr=rate, foreach=False).step()
    captioner.learner.network.zero_grad()


def test_greedy_captions_are_those_of_transformers(drawing, images):
    mine, theirs = roll(drawing, images, GREEDY), roll(drawing.captioner, images, GREEDY)
    assert torch.equal(mine.tokens_NT, theirs.tokens_NT)
    assert torch.equal(mine.mask_RS, theirs.mask_RS)
    assert mine.texts == theirs.texts
    torch.testing.assert_close(mine.logp_RS, theirs.logp_RS, **EXACT)
    assert (mine.group, mine.temperature, mine.entropy_RS) == (6, 1.0, None)


@torch.no_grad()
def test_log_probs_are_the_policys(drawing, images):
    """Temperature, bans, and early and late ends included."""
    banned = [token for token in range(20, 34) if token not in drawing.captioner.end_ids]
    drawing.learner.network.banned_ids = torch.cat([drawing.learner.network.banned_ids, torch.tensor(banned)])
    rollout = roll(drawing, images, seeds=range(40))
    assert gap(drawing, rollout) < 1e-5
    assert not {*banned} & {*rollout.tokens_NT[rollout.mask_RS.bool()].tolist()}
    assert len({*rollout.mask_RS.sum(1).tolist()}) > 2


def test_a_row_follows_from_its_seed(drawing, images):
    whole, again = roll(drawing, images), roll(drawing, images)
    part = roll(drawing, images[1:], seeds=range(6, 12))
    assert whole.texts == again.texts
    assert part.texts == whole.texts[6:]
    assert len({*whole.texts[:6]}) > 1


@pytest.mark.parametrize("finetune", FINETUNE)
def test_every_update_arrives_and_nothing_else_is_sent(drawing, started, images, finetune):
    FINETUNE[finetune]().attach(drawing.learner, keep_reference=False)
    for _ in range(3):
        with torch.no_grad():
            before = roll(drawing, images, GREEDY)
            assert gap(drawing, before) < 1e-5
        (engine,) = started
        assert same_weights(engine, drawing.learner.network)
        update(drawing, images)
        assert gap(drawing, before) > 1e-3  # of another policy
    roll(drawing, images)
    roll(drawing, images)  # with equal weights
    first, *others = map(set, engine.sent)
    assert first == {name for name, _ in engine.model.named_parameters()}
    assert len(others) == 3
    expected = {name for name in first if finetune == "full" or name.endswith("_proj.weight") and "language" in name}
    for names in others:
        assert names >= expected if finetune == "tower" else names == expected
        assert any("visual" in name for name in names) == (finetune != "lora")


def test_changes_behind_the_optimizers_back_arrive(drawing, started, images):
    """A write into `data` leaves no trace on the tensor."""
    roll(drawing, images)
    drawing.learner.network.base.get_output_embeddings().weight.data.mul_(-1)
    with torch.no_grad():
        assert gap(drawing, roll(drawing, images)) < 1e-5


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_inside_reference_the_start_draws(drawing, started, images, finetune):
    start = roll(drawing, images)
    FINETUNE[finetune]().attach(drawing.learner, keep_reference=True)
    update(drawing, images)
    after = roll(drawing, images)
    with drawing.learner.reference():
        inside = roll(drawing, images)
    assert torch.equal(inside.logp_RS, start.logp_RS)
    assert not torch.equal(after.logp_RS, start.logp_RS)
    assert torch.equal(roll(drawing, images).logp_RS, after.logp_RS)
    assert same_weights(started[0], drawing.learner.network)


def test_an_adapter_that_the_run_starts_from_is_its_own_reference(drawing, images, tmp_path):
    LoRA(rank=2).attach(drawing.learner, keep_reference=False)
    update(drawing, images)
    drawing.learner.network.model.save_pretrained(tmp_path)
    start = roll(drawing, images)
    base = drawing.learner.network.model.unload()
    drawing.learner.network.model = base
    LoRA(adapter=str(tmp_path)).attach(drawing.learner, keep_reference=True)
    assert torch.equal(roll(drawing, images).logp_RS, start.logp_RS)
    update(drawing, images)
    assert not torch.equal(roll(drawing, images).logp_RS, start.logp_RS)
    with drawing.learner.reference():
        assert torch.equal(roll(drawing, images).logp_RS, start.logp_RS)


def test_bfloat16_is_rounded_once(drawing, images):
    """The engine's weights are the rounded sum of weight and adapter."""
    LoRA(rank=2).attach(drawing.learner, keep_reference=False)
    update(drawing, images)
    exact = dict(weights(drawing.learner.network, torch.float32))
    for name, weight in weights(drawing.learner.network, torch.bfloat16):
        assert torch.equal(weight, exact[name].bfloat16())


def test_joined_weights_and_padding_have_the_checksum_of_their_parts():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        parts = [torch.randn(size, 3, generator=generator).to(dtype) for size in (4, 2, 2)]
        joined = torch.cat([*parts, torch.zeros(5, 3, dtype=dtype)])
        assert checksum(parts) == checksum([joined])
        joined[0, 0] += joined[0, 0] / 128  # the last bit of bfloat16
        assert checksum(parts) != checksum([joined])


# ------------------------------------------------------------------------------------------------------------ failures


def silent(self, given):
    """Reports success, and loads nothing."""


def half(self, given):
    pairs = list(given)
    fake_vllm.LLM._load_weights(self, pairs[: len(pairs) // 2])


def raises(self, given):
    raise RuntimeError("out of memory")


class Faulty(fake_vllm.LLM):
    """Loads as usual until told otherwise."""

    load, good = staticmethod(silent), 1

    def _load_weights(self, given):
        (fake_vllm.LLM._load_weights if len(self.sent) < self.good else partial(self.load))(self, given)


@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize(("load", "message"), [(silent, "other weights"), (half, "other weights"), (raises, "out of memory")])
def test_a_run_stops_before_it_trains_on_captions_of_other_weights(build, trainer, monkeypatch, load, message, good):
    monkeypatch.setattr(Faulty, "load", staticmethod(load))
    monkeypatch.setattr(Faulty, "good", good)
    (started,) = [fake_vllm.install(monkeypatch, Faulty)]
    module = build(system=Drawing(), loss=GRPOLoss(beta=0.0))
    run = trainer(max_steps=3)
    with pytest.raises(RuntimeError, match=message):
        run.fit(module, data())
    assert run.global_step == good
    assert started[0].drawn == good * 12
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):  # nor does it go on later
        module.predict_step({"image": torch.rand(2, 3, 24, 24), "id": torch.arange(2)})


def test_other_log_probs_than_the_policys_stop_the_first_rollout(build, trainer, monkeypatch):
    fake_vllm.install(monkeypatch, fake_vllm.RawLLM)
    module, run = build(system=Drawing(), sampling=Sampling(0.7, 6)), trainer()
    with pytest.raises(RuntimeError, match="the first rollout's policy ratio is off by"):
        run.fit(module, data())
    assert run.global_step == 0


def test_a_mode_with_other_log_probs_is_refused(fresh, images, monkeypatch):
    fake_vllm.install(monkeypatch, fake_vllm.OtherModeLLM)
    with pytest.raises(RuntimeError, match="vLLM reports raw_logprobs; allowed: processed_logprobs"):
        roll(EngineCaptioner(fresh, VLLMEngine(fresh, FLOAT32)), images)


def test_another_prompt_is_refused(drawing, started, images):
    roll(drawing, images)
    started[0].processor.image_processor.size = {"shortest_edge": 8 * 8, "longest_edge": 16 * 16}
    with pytest.raises(RuntimeError, match="the engine reads a prompt of"):
        roll(drawing, images)


def test_a_caption_that_was_cut_is_refused(fresh, started, images):
    length = int(fresh.prepare(images).rows["attention_mask"].sum(1).max())
    drawing = EngineCaptioner(fresh, VLLMEngine(fresh, VLLM(dtype="float32", max_model_len=length + 2)))
    with pytest.raises(RuntimeError, match=r"a caption was cut after \d tokens.*raise model.init_args.*max_model_len"):
        roll(drawing, images)


def test_a_sharded_policy_is_refused(drawing, started, images, monkeypatch):
    monkeypatch.setattr("uae.models.captioners.engine.FSDPModule", type(drawing.learner.network))  # what sharding makes of it
    with pytest.raises(ValueError, match="trainer.strategy shards the policy; allowed: auto, ddp"):
        roll(drawing, images)
    assert not started


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperatures_that_vllm_changes_are_refused(drawing, images, temperature):
    with pytest.raises(ValueError, match=f"sampling.temperature={temperature}; allowed"):
        roll(drawing, images, Sampling(temperature, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization=0.0; allowed"),
        ({"gpu_memory_utilization": 30}, "gpu_memory_utilization=30; allowed"),
        ({"max_model_len": 0}, "max_model_len=0; allowed"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message):
        VLLM(**settings)


def test_a_missing_library_an_old_one_and_a_machine_without_gpu(fresh, monkeypatch):
    fake_vllm.install(monkeypatch, version="0.9.2")
    with pytest.raises(ValueError, match=r"vLLM 0.9.2 is installed; allowed: 0.33 or newer: pip install 'uae\[vllm\]'"):
        VLLMEngine(fresh, FLOAT32)
    fake_vllm.install(monkeypatch, gpu=False)
    with pytest.raises(ValueError, match=r"reading\.engine needs a CUDA device"):
        VLLMEngine(fresh, FLOAT32)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"reading\.engine needs vLLM .*: pip install 'uae\[vllm\]'"):
        VLLMEngine(fresh, FLOAT32)


def test_compiled_steps_of_another_sampler_are_refused(fresh):
    with pytest.raises(ValueError, match=r"reading\.engine and .*reading\.compile are both set"):
        with_engine(fresh, Reading(engine=FLOAT32, compile=True))


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_has_no_gap_and_a_resumed_one_is_the_same(build, trainer, started, tmp_path):
    """Also after validations, and with a KL term."""

    class Save(Callback):
        def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
            assert run.callback_metrics["policy/sampler_gap"] < 3e-5
            if run.global_step == 2:
                run.save_checkpoint(tmp_path / "2.ckpt")

    def train(resume=None):
        module = build(system=Drawing(), loss=GRPOLoss(beta=0.1), finetune=LoRA(rank=2))
        settings = {"limit_val_batches": 1, "val_check_interval": 1, "num_sanity_val_steps": 0}
        trainer(max_steps=4, callbacks=[Save()], **settings).fit(module, data(), ckpt_path=resume)
        return module

    whole, resumed = train(), train(tmp_path / "2.ckpt")
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    first, second = started
    assert same_weights(first, whole.policy)  # the last thing that they drew for was a validation
    assert same_weights(second, resumed.policy)
    assert second.sent[0] == first.sent[0]  # a new engine gets everything
    assert (len(first.sent), len(second.sent)) == (5, 3)


def test_the_engine_sleeps_while_it_does_not_draw_and_leaves_no_trace(drawing, started, images, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(7)
    environment, expected = dict(os.environ), torch.rand(1)
    torch.manual_seed(7)
    roll(drawing, images)
    assert torch.equal(torch.rand(1), expected)
    assert dict(os.environ) == environment
    (engine,) = started
    assert engine.asleep
    assert engine.settings["enable_sleep_mode"]
    roll(drawing, images)
    assert started == [engine]


def test_an_engine_that_never_sleeps(fresh, started, images):
    drawing = EngineCaptioner(fresh, VLLMEngine(fresh, VLLM(dtype="float32", sleep=False)))
    for _ in range(2):
        with torch.no_grad():
            assert gap(drawing, roll(drawing, images)) < 1e-5  # its cache of prompts is not emptied by sleep
        update(drawing, images)
    assert not started[0].asleep
