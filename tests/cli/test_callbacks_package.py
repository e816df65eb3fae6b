"""A user's own ``callbacks``, in the working directory or on PYTHONPATH, and ours are found under one name."""

import importlib
import sys
from pathlib import Path

import pytest

from uae.cli.callbacks_package import OURS, share_callbacks

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Everything called ``callbacks`` as it was."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "callbacks"}
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "callbacks"]:
        del sys.modules[name]
    sys.modules.update(before)


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


KINDS = {
    "module": ({"callbacks.py": "class Mine: pass\n"}, "callbacks"),
    "package": ({"callbacks/__init__.py": "from callbacks.own import Mine\n", "callbacks/own.py": "class Mine: pass\n"}, "callbacks"),
    "deep": ({"callbacks/__init__.py": "", "callbacks/more/__init__.py": "class Mine: pass\n"}, "callbacks.more"),
    "folder": ({"callbacks/own.py": "class Mine: pass\n"}, "callbacks.own"),
}


@pytest.mark.parametrize("place", ["before ours", "behind ours"])
@pytest.mark.parametrize("imported", [False, True], ids=["first", "ours first"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_are_found(tmp_path, kind, imported, place):
    files, module = KINDS[kind]
    write(tmp_path, files)
    sys.path.insert(0, ROOT)
    if imported:
        importlib.import_module("callbacks.summary")
    sys.path.insert(0 if place == "before ours" else len(sys.path), str(tmp_path))
    for _ in range(2):  # every command of a process asks
        importlib.invalidate_caches()
        share_callbacks()
        assert importlib.import_module(module).Mine.__name__ == "Mine"
        assert Path(importlib.import_module("callbacks.summary").__file__) == OURS / "summary.py"


def test_without_an_own_one_nothing_changes():
    share_callbacks()
    import callbacks

    assert list(callbacks.__path__) == [str(OURS)]


@pytest.mark.parametrize("name", ["callbacks/summary.py", "callbacks/summary/__init__.py"])
def test_equal_names_are_refused_with_both_files(tmp_path, name):
    write(tmp_path, {"callbacks/__init__.py": "", name: ""})
    sys.path.insert(0, str(tmp_path))
    with pytest.raises(ValueError, match="both are imported as callbacks.summary: rename your own") as caught:
        share_callbacks()
    assert str(tmp_path / name) in str(caught.value)
    assert str(OURS / "summary.py") in str(caught.value)


def test_an_own_one_with_an_error_is_named_and_leaves_ours(tmp_path):
    write(tmp_path, {"callbacks.py": "import no_such_library\n"})
    sys.path.insert(0, str(tmp_path))
    with pytest.raises(ValueError, match=r"your own .*callbacks.py cannot be imported: ModuleNotFoundError: No module"):
        share_callbacks()
    sys.path.pop(0)
    assert Path(importlib.import_module("callbacks.summary").__file__) == OURS / "summary.py"
