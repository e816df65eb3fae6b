"""What the doctor says of a machine: versions and their pairs, GPUs, memory, disk, folders of checkpoints."""

import json
import os
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import save_file

from uae.doctor import machine, trial, versions, weights
from uae.doctor.__main__ import main
from uae.files.locations import ROOT
from uae.rehearsal.catalog import MARK

GIB = 2**30


def states(findings):
    return [finding.state for finding in findings]


def test_this_machine_is_ready(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ROOT, raising=False)
    assert main(["--skip_rollout"]) == 0
    out = capsys.readouterr().out
    assert "torchvision works with this torch" in out
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    assert "outputs can be written and locked" in out
    assert not list(tmp_path.iterdir())


def test_versions_outside_of_their_bounds_and_libraries_that_are_missing():
    required = [Requirement("torch>=2.11"), Requirement("jsonargparse[signatures]>=4.53,<5"), Requirement("peft>=0.19")]
    old, missing, good = versions.compare(required, {"torch": "2.9.0+cu128", "peft": "0.20"})
    assert (old.text, old.cure) == ("torch 2.9.0+cu128; allowed: >=2.11", "python -m pip install 'torch>=2.11'")
    assert missing.text.startswith("jsonargparse is not installed")
    assert "'jsonargparse[signatures]<5,>=4.53'" in missing.cure
    assert good.text == "1 libraries within their bounds: peft 0.20"


def test_libraries_that_need_other_versions_of_each_other():
    needs = {"torchvision": ["torch==2.14.1", "numpy", 'pillow>=99; extra == "test"'], "torch": ["pillow"]}
    present = {"torch": "2.14.1+cpu", "torchvision": "0.29.1", "pillow": "11.0"}
    assert states(versions.pairs(present, lambda name: needs.get(name, []))) == ["ok"]
    (apart,) = versions.pairs({**present, "torch": "2.13.0"}, lambda name: needs.get(name, []))
    assert apart.text == "torchvision 0.29.1 needs torch==2.14.1, but torch is 2.13.0"
    assert "torchvision 'torch==2.14.1'" in apart.cure


def test_a_gpu_that_torch_cannot_use_is_a_fault_and_none_is_not(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: 550")
    monkeypatch.setattr(machine, "DRIVER", driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert states([machine._no_gpu(False, "13.0"), machine._no_gpu(True, None)]) == ["note", "wrong"]
    unseen = machine._no_gpu(True, "13.0")
    assert unseen.state == "wrong"
    assert "CUDA_VISIBLE_DEVICES='7'" in unseen.text
    assert "NVRM version: 550" in unseen.text


def test_gpus_that_do_not_read_each_others_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} != {0, 2})
    assert machine.peers(1) == []
    assert states(machine.peers(2)) == ["ok"]
    (apart,) = machine.peers(3)
    assert apart.text.endswith("0-2, 2-0")
    assert "NCCL_P2P_DISABLE=1" in apart.cure


def test_memory_of_a_container_and_little_space(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "LIMITS", (limit, tmp_path / "absent"))
    limit.write_text("max\n")
    whole = machine.memory()
    limit.write_text(f"{GIB}\n")
    assert machine.memory().text.startswith("1.0 GiB of memory") != whole.text.startswith("1.0 GiB")
    usage = namedtuple("usage", "total free")
    for free, state in ((0.5, "wrong"), (2, "note"), (50, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(GIB // 16, int(free * GIB)))
        assert machine.disk(tmp_path / "outputs").state == state
    (small,) = machine.shared_memory(tmp_path)
    assert small.text.startswith("64 MiB of shared memory")
    assert "--shm-size" in small.cure


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    assert machine.writing(tmp_path / "outputs").state == "wrong"


def test_a_place_for_results_that_is_no_folder(tmp_path, monkeypatch):
    def refuse(*args, **named):
        raise PermissionError("no")

    monkeypatch.setattr(machine.tempfile, "TemporaryDirectory", refuse)
    finding = machine.writing(tmp_path / "outputs")
    assert (finding.state, "default_root_dir" in finding.cure) == ("wrong", True)


@pytest.mark.parametrize(
    ("outcome", "found"),
    [
        (subprocess.TimeoutExpired("fit", 1), "was not done after 1 s"),
        (subprocess.CompletedProcess("fit", 2, "", "warning\nerror: no weights\n"), "ended with status 2: error: no weights"),
    ],
)
def test_a_miniature_that_hangs_or_fails(monkeypatch, outcome, found):
    def run(*args, **named):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(trial.subprocess, "run", run)
    finding = trial.check_rollout(limit=1)
    assert finding.state == "wrong"
    assert found in finding.text
    assert "fit --config tiny --config debug/fast" in finding.cure


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder of checkpoints with one that is whole, in two shards."""
    folder = tmp_path / "mirror/openai/clip-vit-large-patch14"
    folder.mkdir(parents=True)
    shards = {name: f"model-{number}.safetensors" for number, name in enumerate("ab")}
    for name, file in shards.items():
        save_file({name: torch.ones(64, 64)}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    torch.save({"c": torch.ones(64, 64)}, folder / "extra.bin")
    monkeypatch.setenv(ROOT, str(tmp_path / "mirror"))
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


SHARD, INDEX, POINTER = "model-1.safetensors", "model.safetensors.index.json", "version https://git-lfs.github.com/spec/v1\n"
DAMAGES = {
    "a shard is missing": (lambda f: (f / SHARD).unlink(), f"{SHARD} of {INDEX} is missing"),
    "a shard is cut": (lambda f: cut(f / SHARD), f"{SHARD} has 16"),
    "only its start is there": (lambda f: (f / SHARD).write_bytes(b"\x40"), f"{SHARD} is truncated at 1 bytes"),
    "a pickle is cut": (lambda f: cut(f / "extra.bin"), "extra.bin is truncated"),
    "no LFS": (lambda f: (f / "extra.bin").write_text(POINTER), "extra.bin is a pointer of Git LFS"),
    "downloading": (lambda f: (f / "x.safetensors.incomplete").touch(), "x.safetensors.incomplete is an unfinished download"),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} cannot be read"),
    "no weights": (lambda f: [path.unlink() for path in f.glob("*[nr]s")] and (f / "extra.bin").unlink(), "there are no weights"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "found"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_is_not_whole(mirror, damage, found):
    assert states(weights.check_folder("clip", mirror)) == ["ok"]
    damage(mirror)
    (fault,) = weights.check_folder("clip", mirror)
    assert fault.state == "wrong"
    assert found in " ".join([fault.text, *weights._faults(mirror)])
    assert f"--local-dir {mirror}" in fault.cure


def test_every_configuration_of_a_real_system_names_its_checkpoints(mirror, monkeypatch):
    needed = weights.needed()
    assert {"uae", "uniworld_v1", "metaquery", "qwen_any", "janus_pro", "emu3"} <= needed.keys()
    assert not {"tiny", "tiny_janus"} & needed.keys()
    assert needed["uae"][:2] == ["UAE", "openai/clip-vit-large-patch14"]
    assert "wusize/openuni" in needed["metaquery"]
    lines = [str(finding) for finding in weights.check_weights()]
    assert any("configs/uae.yaml: 1 of 5 checkpoints are there; not: UAE, zer0int/LongCLIP-L-Diffusers" in line for line in lines)
    assert lines[-1] == "ok     openai/clip-vit-large-patch14 is whole"
    (mirror / MARK).write_text("{}")
    assert "random stand-in" in str(weights.check_weights()[-1])
    for value in ("", "nowhere"):
        monkeypatch.setenv(ROOT, value)
        assert states(weights.check_weights()) == ["wrong"]
