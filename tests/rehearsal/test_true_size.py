"""The benchmark of published sizes, run to its end at the sizes of stand-ins: their configurations are read instead."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.true_size import __main__ as command
from benchmarks.true_size import measure
from benchmarks.true_size.systems import CASES, CLIP, FLUX, JANUS_7B, QWEN_3B, SANA, SD3, Work, filled
from uae.rehearsal import catalog
from uae.systems.blueprints import denoiser_skeleton, vlm_skeleton
from uae.systems.uae import UAE
from uae.systems.uniworld_v1 import PUBLISHED as QWEN_7B

NAMES = (CLIP, FLUX, JANUS_7B, QWEN_3B, QWEN_7B, SANA, SD3.format("medium"), SD3.format("large"))
SIZES = {"batch": 1, "group": 2, "tokens": 5, "steps": 2, "size": 64, "rollouts": 2}
STAGES = {"caption", "condition", "render", "reward", "update"}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_ins")
    catalog.write(folder, NAMES)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_every_case_runs(case, stand_ins, monkeypatch):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(stand_ins))
    found = measure.measured(case, "cpu", SIZES)
    assert set(found["seconds"]) >= STAGES
    assert set(found["peaks"]) >= {"build", *STAGES} - {"reference"}
    for stage in STAGES - ({"condition"} if case == "janus-pro-7b" else set()):  # Janus reads a caption while it draws
        assert found["floors"][stage] > 0
        assert found["plan"][stage] > 0
    assert found["sampler_gap"] < 0.05  # bfloat16
    assert found["tokens_per_second"] == pytest.approx(10 / found["seconds"]["caption"], rel=1e-3)
    text = command.markdown({"surroundings": command.surroundings("cpu"), "sizes": SIZES, "cases": [found]})
    assert f"## {case}" in text
    assert "| caption | " in text


def test_uae_is_planned_as_uae_itself(stand_ins, monkeypatch):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(stand_ins))
    parts, official = CASES["uae"](Work("cpu", 64, 2)).blueprint(), UAE().blueprint()
    assert shapes(parts.policy) == shapes(official.policy)
    assert parts.frozen.keys() == official.frozen.keys()
    assert all(shapes(parts.frozen[name][0]) == shapes(network) for name, (network, _) in official.frozen.items())


def shapes(network):
    return {name: (weight.shape, weight.dtype) for name, weight in network.state_dict().items()}


@pytest.mark.parametrize("skeleton", [lambda: vlm_skeleton(QWEN_3B), lambda: denoiser_skeleton(SANA)], ids=["qwen", "sana"])
def test_a_filled_network_is_random_and_always_the_same(skeleton, stand_ins, monkeypatch):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(stand_ins))
    made, again = filled(skeleton(), "cpu"), filled(skeleton(), "cpu")
    assert shapes(made) == shapes(skeleton())
    for (name, weight), other in zip(made.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other)
        if weight.ndim > 1 and weight.numel() > 1000:
            assert weight.float().std() == pytest.approx(0.02, rel=0.2), name


def test_what_a_constructor_computes_is_kept(stand_ins, monkeypatch):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(stand_ins))
    made = filled(vlm_skeleton(QWEN_3B), "cpu")
    stored, plain = set(made.state_dict()), dict(type(made)(made.config).named_buffers())
    frequencies = {name: value for name, value in made.named_buffers() if name not in stored}  # of rotary embeddings
    assert len(frequencies) > 1
    assert all(torch.equal(value, plain[name]) for name, value in frequencies.items())


def test_what_does_not_fit_is_a_row(stand_ins, monkeypatch):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(stand_ins))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("uae.module.roll_out", full)
    found = measure.measured("uae", "cpu", SIZES)
    assert found["failed"] == "out of memory in stage update"
    text = command.markdown({"surroundings": command.surroundings("cpu"), "sizes": SIZES, "cases": [found]})
    assert "Failed: out of memory in stage update. GiB by plan: caption 0.0;" in text


def test_a_process_that_dies_is_a_row(monkeypatch):
    ends = iter([SimpleNamespace(returncode=-9, stderr=""), SimpleNamespace(returncode=1, stderr="boom"),
                 SimpleNamespace(returncode=0, stdout='noise\n{"case": "uae"}')])  # fmt: skip
    monkeypatch.setattr(command.subprocess, "run", lambda *args, **kwargs: next(ends))
    assert "killed" in command.alone("uae", [], 1)["failed"]
    assert command.alone("uae", [], 1)["failed"] == "boom"
    assert command.alone("uae", [], 1) == {"case": "uae"}
