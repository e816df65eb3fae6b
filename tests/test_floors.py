"""Which file may import which, and how long anything may get. See the README's architecture section."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "types": 0, "remote_code": 0, "locations": 0, "placement": 0, "seeds": 0, "stopwatch": 0, "intervals": 0, "pictures": 0,
    "whole_files": 0,
    "grpo": 1, "encoders": 1, "scenes": 1,
    "models": 2, "rewards": 2, "metrics": 2, "data": 2, "trainable": 2, "shard_files": 1, "checkpoint_files": 2, "event_log": 2,
    "systems": 3, "rollout": 3, "sharded_checkpoints": 2.5, "strategy": 3,
    "measure": 3.5, "policies": 3.5, "evaluation": 3.5, "memory": 3.5,
    "module": 4, "coldstart": 4,
    "cli": 5, "cli_errors": 5, "callbacks": 5,
    "bench": 6,
}  # fmt: skip
ONE_PACKAGE = {"cli_errors": "cli"}
HEAVY = {"transformers", "diffusers", "peft", "open_clip"}
SUBCLASSES_OF_HEAVY = {"uae/models/patch_autoencoder.py"}  # itself imported inside functions only
SOURCES = sorted(path for folder in ("uae", "callbacks") for path in (ROOT / folder).rglob("*.py"))
PYTHON = [*SOURCES, *sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))]


def short(path):
    return path.relative_to(ROOT).as_posix()


def tree(path):
    return ast.parse(path.read_text())


def part(module):
    """The part of the project that a module belongs to: "uae.models.captioner" is of "models"."""
    names = module.split(".")
    return names[0] if names[0] == "callbacks" else names[1] if len(names) > 1 else ""


def imported(path):
    """Every module of the project that a file imports, wherever in the file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}:{node.lineno}: relative import"
            modules = [f"uae.{alias.name}" for alias in node.names] if node.module == "uae" else [node.module]
        else:
            continue
        yield from (name for name in modules if name.split(".")[0] in ("uae", "callbacks"))


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_a_file_imports_from_lower_floors_and_its_own_package_only(path):
    own = part(short(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    if own == "":  # uae/__init__.py
        assert not list(imported(path))
        return
    assert own in FLOORS, f"give {short(path)} a floor"
    for module in imported(path):
        other = part(module)
        same = ONE_PACKAGE.get(own, own) == ONE_PACKAGE.get(other, other)
        assert same or FLOORS[other] < FLOORS[own], f"{short(path)} (floor {FLOORS[own]}) imports {module}"


def test_the_walk_sees_imports_of_every_kind(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "import uae.cli\nfrom uae import measure\ndef f():\n    from uae.data.scenes import x\nimport torch\n"
    )
    assert [part(module) for module in imported(file)] == ["cli", "measure", "data"]


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    top = [node for node in tree(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", "") for node in top}
    heavy = {name.split(".")[0] for name in names} & HEAVY
    assert not heavy or short(path) in SUBCLASSES_OF_HEAVY


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("uae", {"torch", "lightning", *HEAVY}),
        ("uae.types, uae.grpo, uae.scenes", {"lightning", *HEAVY}),
        ("uae.models.captioner, uae.models.renderer, uae.models.finetune, uae.systems.tiny", {"lightning", *HEAVY}),
    ],
)
def test_importing_is_light(module, absent):
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not absent & set(out.split())


@pytest.mark.parametrize("path", PYTHON, ids=short)
def test_names_say_something_and_nothing_is_long(path):
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}
    assert path.read_text().count("\n") <= 350
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [f"{node.name}:{node.lineno}" for node in functions if node.end_lineno - node.lineno >= 70]


def test_the_training_step_fits_on_a_slide():
    (module,) = [n for n in tree(ROOT / "uae/module.py").body if getattr(n, "name", "") == "UnifiedGRPO"]
    (step,) = [node for node in module.body if getattr(node, "name", "") == "training_step"]
    assert step.end_lineno - step.lineno + 1 <= 20


def test_no_machine_is_named():
    folders = "|".join(("work", "root", "home", "opt", "tmp", "Users", "mnt"))
    absolute = re.compile(rf"(?<![\w.~*}}\]/-])/({folders})/")
    texts = [*PYTHON, *ROOT.glob("*.*"), *(ROOT / "configs").rglob("*.yaml"), *(ROOT / "docs").rglob("*.md")]
    texts = [path for path in texts if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml"}]
    assert not [short(path) for path in texts if absolute.search(path.read_text())]


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/pretrain").glob("*.yaml")]), ids=short
)
def test_a_complete_run_says_what_it_is(path):
    heads = [line.split(":")[0] for line in path.read_text().splitlines()[:4]]
    assert heads == ["# What", "# Hardware", "# Command", "# Expect"]
    assert short(path) in path.read_text().splitlines()[2]
