"""Counted operations: known answers at published sizes, and what a real step of a small system does."""

import copy
import warnings
from contextlib import contextmanager

import lightning as L
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from uae import rollout
from uae.grpo import GRPOLoss
from uae.learner import Learner
from uae.memory import flops
from uae.memory.floors import DEVICES, Device, Floor, by_stage, devices_of, lines_of
from uae.memory.phases import Sizes
from uae.memory.processes import processes_of
from uae.memory.stages import floors
from uae.miniature import tiny
from uae.miniature.data import SceneData
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.policy import CaptionPolicy
from uae.models.finetune import LoRA
from uae.models.renderers.rendering import Rendering
from uae.module import UnifiedGRPO
from uae.rewards import EncoderSimilarity, WeightedReward
from uae.stopwatch import Stopwatch
from uae.systems import blueprints
from uae.systems.blueprints import Blueprint
from uae.types import UMM, Sampling
from uae.weights.placement import Placement

QWEN, SD3 = "Qwen/Qwen2.5-VL-3B-Instruct", "stabilityai/stable-diffusion-3.5-large"
IMAGES, GROUP, TOKENS, PROMPT, STEPS, GUIDANCE = 2, 3, 6, 17, 3, 4.0


def test_a_token_of_qwen_takes_two_operations_per_parameter():
    policy = CaptionPolicy(blueprints.vlm_skeleton(QWEN))
    parameters = sum(weight.numel() for weight in policy.base.get_decoder().parameters())  # its table is its head
    assert flops.steps_flop(policy, 1, 1) + flops.head_flop(policy) == pytest.approx(2 * parameters, rel=1e-3)
    assert flops.steps_flop(policy, 400, 10) > 10 * flops.steps_flop(policy, 1, 1)  # attention
    assert flops.tower_flop(policy, 504 * 504) == pytest.approx(1.70e12, rel=0.01)


def test_the_networks_of_stable_diffusion_take_what_is_known_of_them():
    parts, half = blueprints.pipeline_skeletons(SD3, ("text_encoder", "text_encoder_2", "text_encoder_3")), Rendering(256, 256)
    drawn = flops.denoiser_flop(parts["transformer"], parts["vae"], Rendering(512, 512), 250)
    assert drawn == pytest.approx(7.46e12, rel=0.005)
    assert flops.denoiser_flop(parts["transformer"], parts["vae"], half, 250) < 0.5 * drawn
    assert flops.decoder_flop(parts["vae"], Rendering(512, 512)) == pytest.approx(2.515e12, rel=0.005)
    assert flops.encoder_flop(blueprints.encoder_skeleton("openai/clip-vit-large-patch14")) == pytest.approx(0.162e12, rel=0.01)


class Random(tiny.Tiny):
    """The miniature's architecture with random weights; all captions have the same length."""

    def build(self):
        torch.manual_seed(0)
        words = tiny.processor()
        specials = words.tokenizer.convert_tokens_to_ids(tiny.SPECIALS)
        captioner = HFCaptioner(tiny.create_captioner(), words, tiny.INSTRUCTION, extra_banned_ids=specials)
        conditioner, renderer = tiny.create_decoder(steps=STEPS, guidance=GUIDANCE)
        return UMM(captioner, conditioner, renderer)

    def blueprint(self):
        umm = self.build()
        parts = {"reader": umm.conditioner.language_model, "projector": umm.conditioner.projector}
        parts |= {"transformer": umm.renderer.pipe.transformer, "vae": umm.renderer.pipe.vae}
        return Blueprint(
            umm.captioner.learner.network.model.to("meta"),
            {name: (part.to("meta"), Placement("float32")) for name, part in parts.items()},
            Rendering(3, 3, STEPS, GUIDANCE, rows=64, placement=Placement("float32")),  # latents: the autoencoder hides its stride
            prompt_tokens=PROMPT,
            condition_tokens=TOKENS + 1,  # the end behind a caption
        )


def module(finetune):
    return UnifiedGRPO(
        Random(),
        WeightedReward({"clip": EncoderSimilarity(tiny.TinyCLIP())}, {"clip": 1.0}),
        finetune,
        loss=GRPOLoss(beta=0.1),
        sampling=Sampling(max_tokens=TOKENS),
        group=GROUP,
        mini_batches=2,
    )


def at_work(model, monkeypatch):
    """Operations of a real rollout and its update, by stage."""
    found, whole = {}, []

    class Counting(Stopwatch):
        @contextmanager
        def __call__(self, stage):
            with super().__call__(stage), FlopCounterMode(display=False) as counter:
                found.setdefault(stage, []).append(counter)
                yield

    monkeypatch.setattr(rollout, "Stopwatch", Counting)

    class Whole(L.Callback):
        def on_train_batch_start(self, *args):
            whole.append(FlopCounterMode(display=False).__enter__())

        def on_train_batch_end(self, *args):
            whole[-1].__exit__(None, None, None)

    fit = L.Trainer(
        accelerator="cpu", devices=1, max_steps=2, callbacks=[Whole()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # torch counts nothing inside kernels that fuse more
            fit.fit(model, SceneData(batch_size=IMAGES, train_size=8, num_workers=0))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    stages = {stage: sum(one.get_total_flops() for one in some) for stage, some in found.items()}
    return {**stages, "update": sum(one.get_total_flops() for one in whole) - sum(stages.values())}


@pytest.mark.parametrize("targets", [{}, {"target_modules": "all-linear"}], ids=["text", "image tower, too"])
def test_counted_operations_are_those_of_a_real_step(targets, monkeypatch):
    model = module(LoRA(rank=4, **targets))
    blueprint, sizes = model.system.blueprint(), Sizes(IMAGES, GROUP, IMAGES * GROUP, 1, PROMPT, TOKENS, tiny.SIDE**2)
    learner = Learner(CaptionPolicy(copy.deepcopy(blueprint.policy)))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.finetune.attach(learner, keep_reference=False)
    planned = {}
    for floor in floors(model, blueprint, learner.network, sizes, accumulate=1):
        planned[floor.stage] = planned.get(floor.stage, 0) + floor.flop
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)  # its operations are not counted
    real = at_work(module(LoRA(rank=4, **targets)), monkeypatch)
    assert set(planned) == set(real) == {"caption", "condition", "render", "reward", "reference", "replay", "update"}
    assert {stage: planned[stage] / real[stage] for stage in real} == pytest.approx(dict.fromkeys(real, 1.0), abs=0.01)


def test_a_floor_is_the_larger_one_of_computing_and_reading():
    slow = Device("slow", 10.0, 2.0)
    some = Floor("caption", "a", 100.0, 4.0), Floor("caption", "b", 10.0, 4.0), Floor("update", "", 0.0, 6.0)
    assert [floor.seconds(slow) for floor in some] == [10.0, 2.0, 3.0]
    assert by_stage(some, slow) == {"caption": 12.0, "update": 3.0}
    heads, *rows, rule, total = lines_of(some, (slow,))
    assert [row[0] for row in rows] == ["caption: a", "caption: b", "update"]
    assert heads[3:] == ["s, slow", "share"]
    assert total[3:] == ["15", "100.0 %"]
    assert rows[2][3:] == ["3", "20.0 %"]
    assert rule == []
    assert lines_of(some, ())[0] == ["floor of a rollout and its update", "TFLOP", "GB moved"]


def test_seconds_are_for_the_gpu_that_is_there(monkeypatch):
    gpu, cpu = processes_of({"accelerator": "gpu", "devices": 1}), processes_of({"accelerator": "cpu"})
    assert devices_of(cpu) == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {"NVIDIA H200": ["H200"], "NVIDIA GeForce RTX 4090": [device.name for device in DEVICES.values()]}
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert [device.name for device in devices_of(gpu)] == expected
