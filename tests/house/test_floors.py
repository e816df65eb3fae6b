"""Which file may import which, and how long anything may get. See docs/architecture.md."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"transformers", "diffusers", "peft", "open_clip"}
SUBCLASSES_OF_HEAVY = {  # themselves imported inside functions only
    "uae/miniature/patch_autoencoder.py",
    "uae/models/omnigen2/blocks.py",
    "uae/models/omnigen2/pipeline.py",
    "uae/models/omnigen2/transformer.py",
    "uae/models/tokens/x_omni_language_model.py",
}
SOURCES = sorted(path for folder in ("uae", "callbacks") for path in (ROOT / folder).rglob("*.py"))
PYTHON = [*SOURCES, *sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))]


def short(path):
    return path.relative_to(ROOT).as_posix()


def tree(path):
    return ast.parse(path.read_text())


def floors():
    """Room to floor, as the tables of docs/architecture.md say. A room is a folder, or a file beside folders."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    named = [(int(floor), room) for floor, rooms in rows for room in re.findall(r"`([\w/]+)(?:\.py)?/?`", rooms)]
    assert len({room for _, room in named}) == len(named), "a room stands on two floors"
    return {room.rstrip("/").replace("/", "."): floor for floor, room in named}


FLOORS = floors()


def module_of(path):
    return short(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(path) for path in SOURCES}


def room_of(module):
    """The innermost folder or file of the table that a module lies in."""
    names = module.split(".")
    return next((".".join(names[:n]) for n in range(len(names), 0, -1) if ".".join(names[:n]) in FLOORS), None)


def imported(path):
    """Every module of the project that a file imports, wherever in the file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}:{node.lineno}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        yield from (name for name in dict.fromkeys(modules) if name.split(".")[0] in ("uae", "callbacks"))


def test_the_table_names_every_folder_and_nothing_else():
    folders = {module_of(path).rpartition(".")[0] if path.stem != "__init__" else module_of(path) for path in SOURCES}
    ground = {module_of(path) for path in SOURCES if path.parent == ROOT / "uae" and path.stem != "__init__"}
    assert set(FLOORS) == folders - {"uae"} | ground


def test_the_readme_shows_every_room():
    section = (ROOT / "README.md").read_text().partition("## Architecture")[2].partition("\n## ")[0]
    shown = {room.rstrip("/") for room in re.findall(r"`((?:uae|callbacks)[\w/.]*)`", section)}
    folders = {short(path.parent) for path in SOURCES if path.parent != ROOT / "uae" and short(path.parent).count("/") < 2}
    assert folders <= shown
    assert all((ROOT / room).exists() for room in shown)


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_a_file_imports_from_lower_floors_and_its_own_room_only(path):
    own = room_of(module_of(path))
    if own is None:  # uae/__init__.py
        assert not list(imported(path))
        return
    for module in set(imported(path)) - {"uae"}:  # which has the version only, and imports nothing
        other = room_of(module)
        assert other == own or FLOORS[other] < FLOORS[own], f"{short(path)} (floor {FLOORS[own]}) imports {module}"


def test_no_file_imports_itself_by_a_detour():
    imports = {module_of(path): set(imported(path)) & MODULES - {module_of(path)} for path in SOURCES}
    while leaves := {module for module, others in imports.items() if not others & imports.keys()}:
        imports = {module: others for module, others in imports.items() if module not in leaves}
    assert not imports, "these import each other in a circle"


def test_the_core_knows_nothing_of_the_miniature():
    core = [path for path in SOURCES if not short(path).startswith("uae/miniature/")]
    assert not [short(path) for path in core if any(name.startswith("uae.miniature") for name in imported(path))]


def test_a_folder_holds_about_a_dozen_files():
    counts = Counter(short(path.parent) for path in PYTHON if path.stem != "__init__")
    assert not {folder: n for folder, n in counts.items() if n > 13}


def test_the_walk_sees_imports_of_every_kind(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("import uae.strategy\nfrom uae import measure\ndef f():\n    from uae.data.folder import x\nimport torch\n")
    assert list(imported(file)) == ["uae.strategy", "uae.measure", "uae.data.folder"]


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
        ("uae.types, uae.grpo, uae.miniature.scenes", {"lightning", *HEAVY}),
        (
            "uae.models.captioners.captioner, uae.models.renderers.diffusers, uae.models.finetune, uae.miniature.tiny",
            {"lightning", *HEAVY},
        ),
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


@pytest.mark.parametrize("path", sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/pretrain").glob("*.yaml")]), ids=short)
def test_a_complete_run_says_what_it_is(path):
    heads = [line.split(":")[0] for line in path.read_text().splitlines()[:4]]
    assert heads == ["# What", "# Hardware", "# Command", "# Expect"]
    assert short(path) in path.read_text().splitlines()[2]
