"""What identifies a checkpoint is all of its content, and nothing else."""

import os
import shutil

import pytest

from uae.bench.fingerprints import checkpoint_digest, checkpoints


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(tmp_path / "mirror"))
    folder = tmp_path / "mirror/owner/model"
    (folder / "text").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(10_000_000))
    (folder / "text/tokenizer.json").write_text("{}")
    return folder


def digest():
    return checkpoint_digest("owner/model")


def test_one_byte_counts_even_if_size_and_time_stay(mirror):
    before, file = digest(), mirror / "model.safetensors"
    times = file.stat()
    with file.open("r+b") as opened:
        opened.seek(7_654_321)
        opened.write(b"\1")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest() != before


def test_other_tokens_and_other_names_count(mirror):
    found = {digest()}
    (mirror / "text/tokenizer.json").write_text("[]")
    found.add(digest())
    (mirror / "text/tokenizer.json").rename(mirror / "tokenizer.json")
    found.add(digest())
    assert len(found) == 3


def test_copies_links_times_and_records_of_downloads_do_not_count(mirror, tmp_path, monkeypatch):
    before = digest()
    (mirror / ".cache").mkdir()
    (mirror / ".cache/now.metadata").write_text("today")
    (mirror / "README.md").write_text("news")
    os.utime(mirror / "model.safetensors", (1, 1))
    assert digest() == before
    shutil.copytree(mirror, tmp_path / "other/deep/owner/model")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/owner").symlink_to(tmp_path / "other/deep/owner")
    monkeypatch.setenv("UAE_CHECKPOINTS", str(tmp_path / "linked"))
    assert digest() == before


def test_of_a_configuration_only_what_names_checkpoints_is_read(mirror, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/1.png").write_bytes(b"grows with every request")
    named = {"class_path": "owner/model", "init_args": {"parts": ["owner/model", "", "cache", "x" * 5000, "a\0b", 3, None]}}
    assert checkpoints(named) == {"owner/model": digest()}


def test_the_hubs_cache_is_known_by_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--owner--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("UAE_CHECKPOINTS", raising=False)
    assert checkpoint_digest("owner/model") == checkpoint_digest("owner/model/model.pth") == f"commit {commit}"
    assert checkpoint_digest("owner/other") is None
