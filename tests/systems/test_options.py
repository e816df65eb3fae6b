"""Options of real systems, through the command line or the class, and what each changes."""

import hashlib
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.systems.test_fit import fit
from tests.systems.test_real_systems import CAPTIONS, FULL, small
from tests.two_processes import run_on_two
from uae.models.finetune import LoRA
from uae.strategy import unsharded
from uae.systems.uae import UAE
from uae.systems.uniworld_v1 import UniWorldV1

SYSTEM = "--model.init_args.system.init_args"
RATE = "--model.init_args.optimizer.init_args.lr=0.05"


@pytest.fixture
def run(mirrored, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    return lambda name, *extra, deltas=(): fit(name, *deltas, extra=extra)


@pytest.mark.parametrize("name", ["uae", "metaquery"])
@pytest.mark.parametrize("weights", ["live", "start"])
def test_condition_weights(run, name, weights):
    """With "live", captions are read by the trained policy; for "start", training never happened."""
    trained = run(name, f"{SYSTEM}.condition_weights={weights}", RATE, "--model.init_args.loss.beta=0")
    system = trained.model.system
    with torch.no_grad():
        now, before = (umm.conditioner.encode(CAPTIONS) for umm in (trained.model.umm, untrained(system)))
    moved = (now.embeds_NLD - before.embeds_NLD).abs().max()
    assert moved > 1e-3 if weights == "live" else moved < 1e-5


def untrained(system):
    umm = system.build()
    LoRA(rank=4).attach(umm.captioner.learner, keep_reference=True)
    return umm


def test_start_keeps_a_copy_in_full_finetuning(run):
    extra = f"{SYSTEM}.condition_weights=start", RATE, "--model.init_args.loss.beta=0"
    trained = run("uae", *extra, deltas=["finetune/full_pretrained.yaml"]).model
    with torch.no_grad():
        now, before = (u.conditioner.encode(CAPTIONS) for u in (trained.umm, untrained(trained.system)))
    torch.testing.assert_close(now.embeds_NLD, before.embeds_NLD)
    weight = "model.language_model.layers.0.mlp.up_proj.weight"
    policy, copy = (p.model.get_parameter(weight) for p in trained.umm.captioner.learner.roots())
    assert (policy - copy).abs().max() > 1e-3


@pytest.mark.parametrize("extra", [
    [f"{SYSTEM}.condition_on=answer_states"],
    [f"{SYSTEM}.reading.gradient_checkpointing=true"],
    [f"{SYSTEM}.rendering.placement.dtype=float8"],
    [f"{SYSTEM}.rendering.placement.offload=true", f"{SYSTEM}.rendering.slice_vae=true"],
])  # fmt: skip
def test_runs_with(run, extra):
    assert run("uae", "--trainer.max_steps=1", *extra).trainer.global_step == 1


@torch.no_grad()
def test_the_source_image_leaks_where_asked_and_nowhere_else(mirrored):
    """With SigLIP, another image changes what the decoder is told of the same caption; without, nothing does."""
    for siglip in ("google/siglip2-so400m-patch16-512", None):
        umm = UniWorldV1(siglip=siglip, text_encoders=FULL, **small()).build()
        told = []
        for seed in range(2):
            image = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(seed))
            rollout = rollout_of(umm, image)
            told.append(umm.conditioner.encode(CAPTIONS[:1], rollout).embeds_NLD)
        assert torch.equal(*told) == (siglip is None)


def rollout_of(umm, image):
    from uae.types import Sampling

    return umm.captioner.sample(umm.captioner.prepare(image), 1, Sampling(1.0, 2), [0])


def sharded(rank, checkpoints, folder):
    """A run of one of two processes: what it learnt, and what it thinks of captions."""
    os.environ["UAE_CHECKPOINTS"] = checkpoints
    os.chdir(folder)
    sys.argv = ["uae"]
    module = fit("uae", extra=["--trainer.devices=2", "--trainer.strategy=fsdp2", RATE]).model
    with torch.no_grad(), unsharded(module.policy):
        told = module.umm.conditioner.encode(CAPTIONS).embeds_NLD
    return module.trainer.global_step, told


def test_two_sharded_processes_train_as_one_system(checkpoints, tmp_path):
    """The language model conditions the decoder and is sharded: it is whole while captions are read."""
    (steps, told), (other_steps, other) = run_on_two(sharded, str(checkpoints), str(tmp_path), timeout=120)
    assert steps == other_steps == 3
    torch.testing.assert_close(told, other)
    with torch.no_grad():
        start = UAE(str(checkpoints / "UAE"), **small()).build().conditioner.encode(CAPTIONS).embeds_NLD
    assert (told - start).abs().max() > 1e-3


def draw(text, height, width, seed):
    """A flat picture whose color is the caption's."""
    color = tuple(hashlib.sha1(text.encode()).digest()[:3])
    picture = io.BytesIO()
    Image.new("RGB", (width, height), color).save(picture, "PNG")
    return picture.getvalue()


def test_a_renderer_outside_this_process_rewards_captions(run, tmp_path):
    delta = tmp_path / "external.yaml"
    delta.write_text(f"""
model:
  init_args:
    system:
      class_path: uae.systems.external.External
      init_args:
        captioner: Qwen/Qwen2.5-VL-3B-Instruct
        renderer:
          class_path: uae.models.renderers.external.CallableRenderer
          init_args: {{client: "tests.systems.test_options:draw", cache: {tmp_path / "cache"}, height: 24, width: 24}}
        reading: {{dtype: float32}}
""")
    module = run("qwen_any", "--config", str(delta)).model
    rewards = module.trainer.logged_metrics
    assert rewards["reward/std"] > 0  # within groups: other words, another color
    assert len(list(Path(tmp_path / "cache").rglob("*"))) > 2
