"""Configurations by name: a file of the user's, or one of those that come with the package.

A checkout has them in ``configs/``, an installed package in ``uae/configs/``. So the commands of the documentation work in any
folder.
"""

from __future__ import annotations

from collections import defaultdict
from difflib import get_close_matches
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
FOLDER = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
PREFIX, SUFFIX = "configs/", ".yaml"


def names() -> list[str]:
    """The names of all packaged configurations, as in ``tiny`` and ``finetune/full``."""
    return sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob(f"*{SUFFIX}"))


def configuration(name: str, place: str = "--config") -> str:
    """The path of a configuration.

    Args:
        name: Path of a file; or, where there is no such file, the name of a packaged one: ``tiny`` and ``configs/tiny.yaml``
            mean the same.
        place: What the name was given to, for errors.

    Raises:
        FileNotFoundError: There is neither.
    """
    if Path(name).is_file():
        return name
    known = name.removeprefix(PREFIX).removesuffix(SUFFIX)
    if known in names():
        return str(FOLDER / f"{known}{SUFFIX}")
    kind = "a folder, and no file," if Path(name).is_dir() else "no file"
    raise FileNotFoundError(f"{place}: there is {kind} {name!r}; {_hint(known)}")


def _hint(unknown: str) -> str:
    """What was probably meant, and which packaged configurations there are."""
    folders = defaultdict(list)
    for name in names():
        folder, _, file = name.rpartition("/")
        folders[folder].append(file)
    inside = unknown.rpartition("/")[0]
    close = get_close_matches(unknown, names(), n=1) or [name for name in names() if name.endswith(f"/{unknown}")]
    meant = f"did you mean {PREFIX}{close[0]}{SUFFIX}? " if close else ""
    if inside in folders and inside:
        return f"{meant}{PREFIX}{inside} of the package has {', '.join(folders[inside])}"
    fragments = ", ".join(f"{folder} ({len(files)})" for folder, files in folders.items() if folder)
    return f"{meant}the package has the complete runs {', '.join(folders[''])}, and fragments in the folders {fragments}"


def configurations_named(words: list[str], options: tuple[str, ...] = ("--config", "-c")) -> list[str]:
    """A command line in which packaged configurations are given by their paths.

    Args:
        words: The command line.
        options: The options that take a configuration. Their values may also be a configuration itself, as text.

    Raises:
        FileNotFoundError: A configuration does not exist.
    """
    found: list[str] = []
    for word in words:
        option, _, value = word.partition("=")
        if found and found[-1] in options:
            found.append(_path(found[-1], word))
        elif option in options and value:
            found.append(f"{option}={_path(option, value)}")
        else:
            found.append(word)
    return found


def _path(option: str, value: str) -> str:
    is_text = not value or any(mark in value for mark in ("{", "\n", ": "))
    return value if is_text else configuration(value, option)
