"""Configurations of the package by name, in any folder."""

from pathlib import Path

import pytest

from uae import __version__, cli
from uae.bench.geneval import plus
from uae.bench.judging import command
from uae.files.packaged import FOLDER, configuration, configurations_named, names

CONFIGS = Path(__file__).parents[2] / "configs"


def test_names_are_those_of_all_files():
    assert FOLDER == CONFIGS
    assert {"tiny", "finetune/full", "bench/judges/local"} <= set(names())
    assert len(names()) == len(list(CONFIGS.rglob("*.yaml")))


def test_a_name_means_the_users_own_file_first_and_then_the_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny.yaml", "configs/tiny", "configs/tiny.yaml"):
        assert Path(configuration(name)) == CONFIGS / "tiny.yaml"
    (tmp_path / "configs").mkdir()
    for name in ("tiny", "configs/tiny.yaml"):
        Path(name).touch()
        assert configuration(name) == name
    Path("uae").mkdir()  # a folder is no configuration
    assert Path(configuration("uae")) == CONFIGS / "uae.yaml"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("tinny", "there is no file 'tinny'; did you mean configs/tiny.yaml? the package has the complete runs bagel,"),
        ("full", "did you mean configs/finetune/full.yaml?"),
        ("configs/reward/clp.yaml", "did you mean configs/reward/clip.yaml? configs/reward of the package has caption"),
        ("/nowhere/tiny.yaml", "there is no file '/nowhere/tiny.yaml'"),
        ("../tiny", "there is no file '../tiny'"),
        (".", "there is a folder, and no file, '.'"),
    ],
)
def test_a_wrong_name_lists_what_there_is(given, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        configuration(given)
    assert str(error.value).startswith("--config: ")
    assert hint in str(error.value)


def test_only_values_of_config_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny, full = (str(CONFIGS / f"{name}.yaml") for name in ("tiny", "finetune/full"))
    words = ["fit", "--config", "tiny", "--config=finetune/full", "-c", "tiny", "--run_name", "tiny", "--config", '{"seed": 1}']
    assert configurations_named(words) == [
        "fit", "--config", tiny, f"--config={full}", "-c", tiny, "--run_name", "tiny", "--config", '{"seed": 1}',
    ]  # fmt: skip


def test_the_command_line_runs_a_packaged_configuration_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.CLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.chdir(tmp_path)
    run = cli.main(["fit", "--config", "tiny", "--config", "configs/finetune/full.yaml"])
    assert (run.config.fit.run_name, run.config.fit.label.finetune) == ("tiny", "full")


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"uae {__version__}\n"


@pytest.mark.parametrize(
    ("build", "arguments", "option", "missing"),
    [
        (command.build, {"captions": {"a": "a.json", "b": "b.json"}}, "judges", "judge .*: usd_per_million_input is None"),
        (plus.run, {"prompts": "prompts.jsonl"}, "prompt", "prompts.jsonl"),
    ],
)  # fmt: skip
def test_benchmarks_find_their_judges_and_prompts_in_the_package(build, arguments, option, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^--{option}: there is no file 'nothing'"):
        build(**arguments, images=".", folder="f", **{option: "nothing"})
    with pytest.raises((FileNotFoundError, ValueError), match=missing):  # only what the user has to give
        build(**arguments, images=".", folder="f")
