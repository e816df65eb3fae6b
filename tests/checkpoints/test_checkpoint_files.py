"""Checkpoints on disk under fire: killed while written, damaged, prepared to run code, on a full disk."""

import errno
import os
import pickle
import re
import shutil
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from tests.cli.test_cli import FAST, TINY, UNTRAINED, configs
from uae import cli
from uae.checkpoints.files import CheckpointFiles, newest, partial_of, read, read_metadata, tidy, write
from uae.checkpoints.sharded import ShardedCheckpoints, _finish, _start
from uae.checkpoints.shards import PlainPlanner, ShardReader

VERSION = "pytorch-lightning_version"


def save_file(path, number):
    CheckpointFiles().save_checkpoint(content(number) | {"state_dict": {"w": torch.full((1000,), number)}}, path)


def save_shards(path, number):
    """What the first process does in `ShardedCheckpoints.save_checkpoint`."""
    _start(partial_of(path))
    dcp.save(shards(number), checkpoint_id=partial_of(path), no_dist=True)
    _finish(content(number), partial_of(path), path)


def content(number):
    return {VERSION: "2.6.6", "global_step": number}


def shards(number):
    return {"state_dict": {"w": torch.full((1000,), float(number))}, "optimizer_0": {"param_groups": [{"lr": 0.1}]}}


def number_of(path):
    if path.is_file():
        assert read(path)["state_dict"]["w"].unique() == read(path)["global_step"]
        return read(path)["global_step"]
    state = shards(-1)
    dcp.load(state, storage_reader=ShardReader(path), planner=PlainPlanner(), no_dist=True)
    assert state["state_dict"]["w"].unique() == read_metadata(path)["global_step"]
    return read_metadata(path)["global_step"]


def killed(work, *args, after):
    """Run something in a process of its own that is killed after so many calls to the operating system; whether it was."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    calls = SimpleNamespace(count=0)

    def watched(call):
        def wrapped(*args, **kwargs):
            if calls.count == after:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.count += 1
            return call(*args, **kwargs)

        return wrapped

    try:
        for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "open")):
            setattr(module, name, watched(getattr(module, name)))
        torch.save = watched(torch.save)
        Path.mkdir = watched(Path.mkdir)
        work(*args)
    finally:
        os._exit(0)


@pytest.mark.parametrize("after", [save_file, save_shards])
@pytest.mark.parametrize("before", [save_file, save_shards])
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_or_the_new(tmp_path, before, after):
    seen, moment, ended = [], 0, False
    while not ended:
        folder = tmp_path / str(moment)
        before(folder / "last.ckpt", 1)
        ended = not killed(after, folder / "last.ckpt", 2, after=moment)
        for _ in range(2):  # as the next run finds it, and after it has tidied up
            seen.append(number_of(newest(folder)))
            tidy(folder)
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
        assert seen[-2] == seen[-1]
        moment += 1
    assert moment > 5
    assert set(seen) == {1, 2}
    assert seen == sorted(seen)


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def put(name, data):
    return lambda path: path.joinpath(name).write_bytes(data) if path.is_dir() else path.write_bytes(data)


def halve(name=""):
    return lambda path: os.truncate(path / name, (path / name).stat().st_size // 2)


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "no weights")


FILE_FAULTS = {
    "empty": (put("", b""), "is empty"),
    "truncated": (halve(), "truncated or damaged"),
    "text": (put("", b"not a checkpoint at all"), "damaged or not a checkpoint"),
    "an archive": (foreign_zip, "truncated or damaged"),
    "safetensors": (lambda path: safetensors.torch.save_file({"w": torch.ones(3)}, path), "not a checkpoint"),
    "weights alone": (lambda path: torch.save({"w": torch.ones(3)}, path), "is not the checkpoint of a run"),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), "is not the checkpoint of a run"),
    "code": (lambda path: torch.save({**content(1), "state_dict": Code()}, path), r"holds posix\.mkdir.*refused"),
    "an old pickle": (lambda path: path.write_bytes(pickle.dumps(Code())), "damaged or not a checkpoint|refused"),
    "gone": (lambda path: (path.rename(path.with_name("x")), path.symlink_to("y")), "is a link to 'y', which is gone"),
    "shards": (lambda path: (path.unlink(), path.mkdir()), "strategy fsdp2"),
}
SHARD_FAULTS = {
    "no index": (lambda path: (path / ".metadata").unlink(), r"\.metadata is missing"),
    "no rest": (lambda path: (path / "meta.pt").unlink(), r"meta\.pt is missing"),
    "a short index": (halve(".metadata"), "damaged"),
    "a short rest": (halve("meta.pt"), r"meta\.pt' is truncated"),
    "a short shard": (halve("__0_0.distcp"), r"truncated.*its part __0_0\.distcp has \d+ bytes of \d+"),
    "no shard": (lambda path: (path / "__0_0.distcp").unlink(), r"its part __0_0\.distcp is missing"),
    "code in the index": (put(".metadata", pickle.dumps(Code())), r"holds posix\.mkdir.*refused"),
    "code in the rest": (lambda path: torch.save(Code(), path / "meta.pt"), r"holds posix\.mkdir.*refused"),
    "another index": (put(".metadata", pickle.dumps({})), "damaged or not a checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("save", "reader", "fault"),
    [
        *(pytest.param(save_file, read, fault, id=name) for name, fault in FILE_FAULTS.items()),
        *(pytest.param(save_shards, read_metadata, fault, id=name) for name, fault in SHARD_FAULTS.items()),
    ],
)
def test_a_bad_checkpoint_is_one_line_with_its_name_and_never_runs(tmp_path, monkeypatch, save, reader, fault):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step=1.ckpt"
    save(path, 1)
    assert number_of(path) == 1
    inflict, message = fault
    inflict(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as stop:
        reader(path)
    assert str(path) in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not Path("ran").exists()


def test_code_among_shards_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = shards(1)
    state["optimizer_0"]["param_groups"][0]["lr"] = Code()
    dcp.save(state, checkpoint_id=tmp_path / "x", no_dist=True)
    wanted = shards(1)
    with pytest.raises(dcp.CheckpointException, match="Weights only load failed"):
        dcp.load(wanted, storage_reader=ShardReader(tmp_path / "x"), planner=PlainPlanner(), no_dist=True)
    assert not Path("ran").exists()
    dcp.load(wanted, checkpoint_id=tmp_path / "x", no_dist=True)  # PyTorch's own planner
    assert Path("ran").exists()


def test_parts_outside_the_folder_are_refused(tmp_path):
    save_shards(tmp_path / "a.ckpt", 1)
    shutil.copy(tmp_path / "a.ckpt/__0_0.distcp", tmp_path / "__0_0.distcp")
    index = (tmp_path / "a.ckpt/.metadata").read_bytes()
    metadata = pickle.loads(index)
    for part in metadata.storage_data.values():
        part.relative_path = "../__0_0.distcp"
    (tmp_path / "a.ckpt/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="outside the folder"):
        read_metadata(tmp_path / "a.ckpt")


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(TypeError, match=r"PosixPath.*only tensors and plain Python"):
        write(content(1) | {"folder": tmp_path}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["torch.save", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch, call):
    path = tmp_path / "a.ckpt"
    save_file(path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(f"uae.checkpoints.files.{call}", full)
        with pytest.raises(OSError, match="No space left on device"):
            save_file(path, 2)
    assert number_of(path) == 1
    assert list(tmp_path.iterdir()) == [path]  # the disk is full: nothing half done stays on it


@pytest.mark.parametrize("stage", ["shards", "index", "rest"])
def test_a_full_disk_leaves_the_old_shards(tmp_path, monkeypatch, stage):
    class Alone(ShardedCheckpoints):
        broadcast = staticmethod(lambda value: value)
        is_global_zero = True

    def save(number):
        Alone().save_checkpoint({**content(number), "state_dict": shards(number)["state_dict"]}, tmp_path / "a.ckpt")

    save(1)
    with monkeypatch.context() as patch:
        place = {
            "shards": (dcp.FileSystemWriter, "write_data"),
            "index": (dcp.FileSystemWriter, "finish"),
            "rest": (torch, "save"),
        }
        patch.setattr(*place[stage], full)
        with pytest.raises(OSError, match=r"a\.ckpt.* cannot be written.*No space left on device"):
            save(2)
    assert read_metadata(tmp_path / "a.ckpt")["global_step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_the_command_line_says_which_checkpoint_is_bad_and_why(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step=1.ckpt"
    other = content(1) | {"state_dict": {"w": torch.ones(3)}, "loops": {}}  # of another project
    faults = {
        **{name: FILE_FAULTS[name] for name in ("truncated", "code")},
        "foreign": (lambda path: torch.save(other, path), r"does not fit what trains here: \d+ missing.*1 unexpected"),
    }
    for inflict, message in faults.values():
        save_file(path, 1)
        inflict(path)
        with pytest.raises(SystemExit) as stop:
            cli.main(["fit", *configs(TINY, FAST, UNTRAINED), "--ckpt_path", str(path)])
        assert stop.value.code == 2
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        assert str(path) in line
        assert re.search(message, line)
    assert not Path("ran").exists()
