"""Judges on this machine."""

import pytest

from tests.bench.judging.fake_judges import PROMPT, SECRET, judge_entry, write_captions, write_judges
from uae.bench.judging import command as judge


@pytest.fixture
def judging(tmp_path, monkeypatch):
    """Build a comparison of two systems on some images for judges at a server; returns its folder."""
    monkeypatch.setenv("FAKE_KEY", SECRET)

    def build(server, images=3, apis=("openai",), systems=None, **changes):
        names = [f"{i:03d}.png" for i in range(images)]
        systems = systems or {
            "ours": {name: f"good good {name}" for name in names},
            "theirs": {name: f"good {name}" for name in names},
        }
        judges = write_judges(tmp_path / "judges.yaml", **{api: judge_entry(api, server.address, **changes) for api in apis})
        files = write_captions(tmp_path, systems)
        judge.build(files, str(tmp_path / "images"), str(tmp_path / "work"), judges=judges, prompt=PROMPT)
        return str(tmp_path / "work")

    return build
