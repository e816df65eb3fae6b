"""What the README says exists, and its commands are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from uae import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line.split("#")[0])
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "uae.cli" in line and "--print_plan" not in line  # ends there; see test_cli
]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", README.replace("make and", "")))
    assert {"demo", "test", "pretrain", "tensorboard"} <= named <= targets | {"and"}


def test_files_it_names_exist() -> None:
    names = set(re.findall(r"`((?:uae|configs|callbacks|tests|benchmarks|docs|notebooks)/[\w./]*)`", README))
    names |= set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_first_command_comes_early_and_the_page_is_short() -> None:
    lines = README.splitlines()
    assert lines.index("```console") < 25
    assert len(lines) <= 200


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command)[-60:])
def test_commands_are_accepted(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command parses to the end through the real command line; the run itself is left out."""
    seen = []
    monkeypatch.setattr(cli.CLI, "_run_subcommand", lambda self, subcommand: seen.append(subcommand))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.setenv("UAE_CHECKPOINTS", str(tmp_path))
    arguments = command[command.index("uae.cli") + 1 :]
    if "--stage" in arguments:
        arguments.append("--trainer.fast_dev_run=true")  # a stage needs no export of the one before, which is left out
    cli.main(arguments)
    assert seen == [arguments[0]] * max(1, arguments.count("--stage"))
