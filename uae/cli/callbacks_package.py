"""Lets a project of the user's have a package or a module called ``callbacks``, as our configurations name ``callbacks.summary``."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path

NAME = "callbacks"
OURS = Path(__file__).parents[2] / NAME


def share_callbacks() -> None:
    """Make the modules in our ``callbacks`` and whatever is in the user's importable under that one name.

    The user's is the one that Python finds if ours is left out. It becomes ``callbacks``, and our folder is one more place of
    its submodules. A folder without ``__init__.py`` is one more place of our submodules.

    Raises:
        ValueError: Both have a module of the same name, or the user's cannot be imported.
    """
    spec = PathFinder.find_spec(NAME, [place for place in sys.path if Path(place).resolve() / NAME != OURS.resolve()])
    if spec is None:
        return
    theirs = list(spec.submodule_search_locations or ())
    _check_names(theirs)
    if spec.loader is None or spec.origin is None:
        ours = import_module(NAME)
        ours.__path__ = [*ours.__path__, *(place for place in theirs if place not in ours.__path__)]
    elif getattr(sys.modules.get(NAME), "__file__", None) != spec.origin:
        _load(spec)
        sys.modules[NAME].__path__ = [*theirs, str(OURS)]


def _check_names(theirs: list[str]) -> None:
    ours = {file.stem: file for file in OURS.glob("[!_]*.py")}
    for place in map(Path, theirs):
        for name, file in ours.items():
            for other in (place / f"{name}.py", place / name / "__init__.py"):
                if other.is_file():
                    raise ValueError(f"{other} has the name of {file}, and both are imported as {NAME}.{name}: rename your own")


def _load(spec: ModuleSpec) -> None:
    """Import what a spec describes as ``callbacks``, in the place of what has that name now."""
    before, module = sys.modules.get(NAME), module_from_spec(spec)
    sys.modules[NAME] = module
    assert spec.loader is not None
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(NAME)
        if before is not None:
            sys.modules[NAME] = before
        raise ValueError(f"your own {spec.origin} cannot be imported: {type(error).__name__}: {error}") from error
