"""Environment variables in configurations: an empty one names itself instead of meaning the working directory."""

import re
from pathlib import Path

import pytest

from uae import cli

CONFIGS = Path(__file__).parents[2] / "configs"
READ = re.compile(r"\$\{oc\.env:(\w+)")
USES = sorted({(name, file) for file in CONFIGS.rglob("*.yaml") for name in READ.findall(file.read_text())})


@pytest.fixture
def parse(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.CLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.chdir(tmp_path)

    def parse_file(file, *words):
        base = [] if file.parent == CONFIGS else ["--config", str(CONFIGS / "tiny.yaml")]
        return cli.main(["fit", *base, "--config", str(file), *words])

    return parse_file


@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize(("name", "file"), USES, ids=lambda value: getattr(value, "name", value))
def test_every_variable_of_the_shipped_configurations_names_itself_where_it_is_empty(parse, monkeypatch, capsys, name, file, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        parse(file)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"the environment variable {name} is empty: give it a value, or unset it" in line


def test_variables_are_read_where_they_are_set_and_only_where_they_are_used(parse, monkeypatch):
    folder = CONFIGS / "data" / "folder.yaml"
    monkeypatch.delenv("UAE_IMAGES", raising=False)
    assert parse(folder).datamodule.root == "images"
    monkeypatch.setenv("UAE_IMAGES", "photographs")
    assert parse(folder).datamodule.root == "photographs"
    monkeypatch.setenv("UAE_IMAGES", "")
    assert parse(folder, "--data.init_args.root", "mine").datamodule.root == "mine"


def test_a_variable_without_default_must_be_set(parse, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "own.yaml").write_text("run_name: ${oc.env:NOWHERE}\n")
    with pytest.raises(SystemExit):
        parse(tmp_path / "own.yaml")
    assert "NOWHERE" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["", " "])
@pytest.mark.parametrize("key", ["root", "val_root", "test_root", "predict_root"])
def test_an_empty_path_names_its_key(parse, capsys, key, given):
    with pytest.raises(SystemExit):
        parse(CONFIGS / "data" / "folder.yaml", f"--data.init_args.{key}={given}")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"data.init_args.{key}={given!r} is empty" in line
