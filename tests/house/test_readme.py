"""What the README and the pages of docs/ say exists, and the commands of the first pages are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from uae import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FIRST = README + (ROOT / "docs/using.md").read_text()  # what a new user types
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    shlex.split(line)
    for line in dict.fromkeys(
        line.split("#")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", FIRST, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if "uae.cli" in line and "--print_plan" not in line  # ends there; see test_cli
    )
]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", FIRST)) | set(re.findall(r"^make ([a-z-]+)", FIRST, re.MULTILINE))
    assert {"demo", "test", "pretrain", "tensorboard"} <= named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_it_names_exist(page: Path) -> None:
    text = page.read_text()
    names = {ROOT / name for name in re.findall(r"`((?:uae|configs|callbacks|tests|benchmarks|docs|notebooks)/[\w./]*)`", text)}
    names |= {page.parent / name for name in re.findall(r"\]\((?!http)([^)#]+)\)", text)}
    assert [str(name) for name in names if not name.exists()] == []


def heading_links(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_pages_lead_to_a_heading(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text())
    wrong = [(name, mark) for name, mark in links if mark not in heading_links(page.parent / name if name else page)]
    assert wrong == []


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    listed = set(re.findall(r"\]\(([\w.]+\.md)\)", index))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_first_command_comes_early_and_the_page_is_short() -> None:
    lines = README.splitlines()
    assert lines.index("```console") < 25
    assert len(lines) <= 150


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
