"""What no engine runs here: container, CI, development container and citation agree with the repository."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from uae import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
OF_PYTHON = {"pip", "venv", "build"}  # modules that CI gets from Python or installs in the same line
TARGETS = set(re.findall(r"^([\w./-]+)(?: [\w./-]+)*:(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
TARGETS |= {"test-lowest", "test-highest", ".venv/.installed"}  # by pattern, and by variable


def instructions(name: str) -> list[list[str]]:
    return [shlex.split(rest) for rest in re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)]


def jobs() -> dict[str, dict]:
    return WORKFLOW["jobs"]


def lines() -> list[str]:
    """Every command of the workflow, once for every value of its matrix."""
    found = []
    for job in jobs().values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            said = [step["run"]] if "run" in step else []
            for name, values in matrix.items():
                said = [line.replace(f"${{{{ matrix.{name} }}}}", value) for line in said for value in values]
            found += [part.strip() for line in dict.fromkeys(said) for part in line.split("&&")]
    return found


def check_command(words: list[str]) -> None:
    """A make target, or a module, that exists."""
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert targets
        assert set(targets) <= TARGETS, words
    elif words[0].endswith("python"):
        module = words[words.index("-m") + 1]
        assert module in OF_PYTHON or find_spec(module), words
        configs = [after for word, after in zip(words, words[1:], strict=False) if word == "--config"]
        assert all((ROOT / "configs" / f"{name}.yaml").is_file() for name in configs)
    else:
        assert words[0] in {"mkdir"}, words


def test_the_container_copies_what_is_there_and_runs_as_another_user_than_root() -> None:
    sources = [word for words in instructions("COPY") for word in words[:-1]]
    assert {"uae", "callbacks", "configs", "pyproject.toml", "setup.py", "LICENSE"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert not set(sources) & set((ROOT / ".dockerignore").read_text().split())
    assert instructions("USER") == [["uae"]]
    assert DOCKERFILE.index("USER uae") < DOCKERFILE.index("ENTRYPOINT")
    assert DOCKERFILE.index("-r libraries.txt") < DOCKERFILE.index("COPY uae"), "code must not make the libraries anew"
    check_command([*in_brackets("ENTRYPOINT"), *in_brackets("CMD")])


def in_brackets(name: str) -> list[str]:
    (words,) = re.findall(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    found: list[str] = json.loads(words)
    return found


def test_compose_trains_and_shows_what_was_trained() -> None:
    train, board = COMPOSE["services"]["train"], COMPOSE["services"]["tensorboard"]
    check_command([*in_brackets("ENTRYPOINT"), *train["command"]])
    check_command(board["entrypoint"])
    assert train["volumes"] == board["volumes"] == ["outputs:/uae/outputs"]
    assert "outputs" in COMPOSE["volumes"]
    assert "WORKDIR /uae\n" in DOCKERFILE


@pytest.mark.parametrize("line", lines())
def test_every_command_of_ci_exists(line: str) -> None:
    check_command(shlex.split(line))


def test_ci_runs_lint_two_versions_of_python_both_bounds_and_the_wheel() -> None:
    assert {"make PYTHON=python lint", "make PYTHON=python types", "make PYTHON=python unit"} <= set(lines())
    assert {"make PYTHON=python test-lowest", "make PYTHON=python test-highest"} <= set(lines())
    python = jobs()["tests"]["strategy"]["matrix"]["python"]
    declared = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert [python[0], python[-1]] == [declared[0], declared[-1]]
    assert "python -m build" in lines()


def test_the_development_container_and_the_templates_can_be_read() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    check_command(shlex.split(container["postCreateCommand"]))
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert [file.stem for file in forms] == ["addition", "bug", "config", "run"]
    for form in (yaml.safe_load(file.read_text()) for file in forms if file.stem != "config"):
        assert {"name", "description", "body"} <= form.keys()
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids)
    hooks = [hook["id"] for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]]
    assert {"ruff-check", "ruff-format", "nbstripout", "codespell"} <= set(hooks)


def test_the_version_and_the_licence_are_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## {__version__} - {citation['date-released']}" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == "Apache-2.0"
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest().startswith("cfc7749b96f63bd3")  # the licence's own text, unchanged
    paper = citation["preferred-citation"]
    assert paper["identifiers"][0]["value"] == "arXiv:2509.09666"
    assert len(paper["authors"]) == 14
