"""Every ``python -m uae...`` of README.md, CONTRIBUTING.md and docs/ is accepted by the parser of its command, with its files."""

from __future__ import annotations

import re
import shlex
from functools import partial
from importlib import import_module
from pathlib import Path

import jsonargparse
import pytest

from tests.house import test_readme
from uae.bench import arguments as bench_arguments
from uae.bench import generate
from uae.bench.__main__ import COMMANDS
from uae.check.command import understood
from uae.cli.command import Parsed
from uae.cli.stages import SUBCOMMANDS, split

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"CONFIG": "configs/tiny.yaml", "my_system.yaml": "configs/uae.yaml", "outputs/tiny/config.yaml": "configs/tiny.yaml"}
NAMES = {"uae.cli": SUBCOMMANDS, "uae.bench": COMMANDS}
ENDS = {"|", "||", "&", "&&", ";", "\\"}
RUN = {  # where commands are really run, at tiny size
    "uae.cli fit": "tests/cli/test_cli.py",
    "uae.cli test": "tests/cli/test_cli.py",
    "uae.cli predict": "tests/cli/test_cli.py",
    "uae.check": "tests/check/test_command.py",
    "uae.doctor": "tests/doctor/test_runs.py",
    "uae.rehearsal": "tests/rehearsal/test_rehearsal.py",
    "uae.report": "tests/report/test_run_page.py",
}


def commands() -> list[tuple[str, ...]]:
    """Module and words of every command, once."""
    found = {}
    for page in PAGES:
        for module, rest in re.findall(r"-m (uae(?:\.\w+)*)([^`\n]*)", page.read_text().replace("\\\n", " ")):
            words = [PLACEHOLDERS.get(word, word) for word in shlex.split(rest, comments=True)]
            end = next((n for n, word in enumerate(words) if word in ENDS), len(words))
            found[(module, *words[:end])] = None
    return list(found)


TYPED = commands()
ELSEWHERE = {tuple(words[words.index("-m") + 1 :]) for words in test_readme.COMMANDS}  # parsed there, with all that they make


class Stopped(Exception):  # noqa: N818 (nothing is wrong)
    """Parsed; nothing is to be run."""


@pytest.fixture(scope="module")
def cli():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["uae"])
        patch.chdir(ROOT)
        parsed = Parsed(["fit", "--config", "configs/tiny.yaml"])
        seen = {("fit", "--config", "configs/tiny.yaml")}  # a parse takes a second, and several commands differ in the checkpoint only

        def parse(words):
            words = [word for before, word in zip(["", *words], words, strict=False) if "--ckpt_path" not in (before, word)]
            if tuple(words) not in seen:
                parsed.parse_arguments(parsed.parser, words)
            seen.add(tuple(words))

        yield parse


def parse_cli(words, cli, monkeypatch):
    before, stages, after = split(words)
    for one in [stage.words for stage in stages] or [[]]:
        cli([*before, *one, *after])


def parse_check(words, cli, monkeypatch):
    systems, more, _ = understood(list(words))
    for system in systems:
        cli(["fit", "--config", system, *more])


def parse_bench(words, cli, monkeypatch):
    def parse(components, args, **settings):
        jsonargparse.capture_parser(partial(jsonargparse.auto_cli, components, args=args, **settings)).parse_args(args)
        raise Stopped

    def kept(words, own):
        mine, rest = whole(words, own)
        systems.append(rest)
        return mine, rest

    systems, whole = [], generate.split_options
    monkeypatch.setattr(bench_arguments, "auto_cli", parse)
    monkeypatch.setattr(generate, "split_options", kept)
    with pytest.raises(Stopped):
        import_module(COMMANDS[words[0]].module).main(list(words[1:]))
    for rest in systems:
        cli(["predict", *rest])


def parse_doctor(words, cli, monkeypatch):
    from uae.doctor import __main__ as doctor

    monkeypatch.setattr(doctor, "of_run", lambda folder: ())
    monkeypatch.setattr(doctor, "of_machine", lambda with_rollout: ())
    assert doctor.main(list(words)) == 0


def parse_rehearsal(words, cli, monkeypatch):
    from uae.rehearsal import __main__ as rehearsal

    monkeypatch.setattr(rehearsal, "write", lambda *_: None)
    monkeypatch.setattr(rehearsal, "quiet", lambda: None)
    rehearsal.main(list(words))


def parse_report(words, cli, monkeypatch):
    from uae.report import __main__ as report

    monkeypatch.setattr(report, "write_run_page", lambda folder: folder)
    report.main(list(words))


PARSE = {
    "uae.cli": parse_cli, "uae.check": parse_check, "uae.bench": parse_bench, "uae.doctor": parse_doctor,
    "uae.rehearsal": parse_rehearsal, "uae.report": parse_report,
}  # fmt: skip


@pytest.mark.parametrize("command", [one for one in TYPED if one not in ELSEWHERE], ids=lambda command: " ".join(command)[:90])
def test_commands_are_parsed(command, cli, monkeypatch):
    module, *words = command
    monkeypatch.setenv("UAE_CHECKPOINTS", "checkpoints")
    if len(words) < 2 and module in NAMES:  # the text names the command, and nobody types it
        assert set(words) <= set(NAMES[module])
    elif words or module == "uae.doctor":
        PARSE[module](words, cli, monkeypatch)


def test_commands_that_are_run_at_tiny_size() -> None:
    typed = {module if module != "uae.cli" else f"{module} {words[0]}" for module, *words in TYPED if words}
    assert typed - {"uae.bench"} == RUN.keys()
    for command, test in RUN.items():
        assert command.split()[0] in (ROOT / test).read_text(), f"{test} does not run {command}"
