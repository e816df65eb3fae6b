"""Every complete configuration passes the conformance kit, with stand-ins for the weights of real systems.

A new system needs a configuration, and a line in the cases of ``python -m benchmarks.conformance``.
"""

import json
from pathlib import Path

import pytest

from benchmarks.conformance.__main__ import CASES, ROOT, words_of
from uae.check.command import main

COVERED = {"tiny, images", "uae, full", "uae, images", "janus_pro", "emu3", "omnigen2"}  # by another case of the same system
ALWAYS = ["training: gradients arrive", "training: nothing else trains", "training: frozen bytes", "training: resumes"]
ALWAYS += ["captions: causality", "pictures: size", "reference: value"]


def test_no_configuration_is_left_out():
    assert {case.partition(",")[0] for case in CASES} == {path.stem for path in Path(ROOT, "configs").glob("*.yaml")}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch says that a norm could be faster
@pytest.mark.parametrize("case", [case for case in CASES if case not in COVERED])
def test_it_passes_every_check(case, mirrored, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["uae"])
    with pytest.raises(SystemExit) as stop:
        main([*words_of(case), "--json", str(tmp_path / "check.json")])
    (found,) = json.loads((tmp_path / "check.json").read_text()).values()
    failed = {name: one["reason"] for name, one in found.items() if one["verdict"] == "failed"}
    assert stop.value.code == 0, failed or capsys.readouterr().err
    missing = {*ALWAYS} - {name for name, one in found.items() if one["verdict"] == "passed"}
    assert not missing, {name: found[name]["reason"] for name in missing}
