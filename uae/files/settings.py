"""YAML files that users write. A key that is given twice is an error; YAML itself would silently keep the last one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from jsonargparse._optionals import get_omegaconf_loader

NULL = ("null", "~")


class RepeatedKeyError(yaml.YAMLError):
    """A mapping has a key twice.

    Args:
        path: Path of the file, or "" for a text on the command line.
        key: The key.
        first: Number of the line in which the key is first given, counted from 1.
        second: Number of the line in which it is given again.
    """

    def __init__(self, path: str, key: str, first: int, second: int) -> None:
        where = f"{path!r} has" if path else "there is"
        super().__init__(f"{where} the key {key!r} twice, in line {first} and in line {second}; remove one of them")
        self.first, self.second = first, second


def read_settings(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        RepeatedKeyError: A mapping has a key twice.
        yaml.YAMLError: The file is not YAML.
    """
    text = Path(path).read_text(encoding="utf-8")
    refuse_repeated_keys(text, str(path))
    return yaml.safe_load(text)


def refuse_repeated_keys(text: str, path: str = "") -> None:
    """Check that no mapping of a YAML text has a key twice.

    Raises:
        RepeatedKeyError: A mapping has.
        yaml.YAMLError: The text is not YAML. A text that is too short to have two keys is not looked at; who reads it finds the error.
    """
    if "{" not in text and "?" not in text and text.count(":") < 2:  # outside braces every key has its own ":" or "?"
        return
    nodes, visited = [yaml.compose(text, Loader=yaml.SafeLoader)], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in visited:  # an alias
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value in lines:
                    raise RepeatedKeyError(path, key.value, lines[key.value], line)
                lines[str(key.value)] = line
                nodes.append(value)


def nulls_kept(arguments: Sequence[str]) -> list[str]:
    """A command line in which ``--KEY=null`` means null for keys inside the arguments of a class, too.

    The parser would turn null into the text "None" there. In a configuration, which an argument ``--config`` may hold instead
    of a file's name, it does not.

    Args:
        arguments: The command line.
    """
    kept: list[str] = []
    for argument in arguments:
        split = bool(kept) and "=" not in kept[-1] and argument in NULL and _is_inside_a_class(kept[-1])
        key, _, value = f"{kept.pop()}={argument}".partition("=") if split else argument.partition("=")
        if value in NULL and _is_inside_a_class(key):
            tree: Any = None
            for part in reversed(key.removeprefix("--").split(".")):
                tree = {part: tree}
            kept += ["--config", json.dumps(tree)]
        else:
            kept.append(argument)
    return kept


def _is_inside_a_class(key: str) -> bool:
    return key.startswith("--") and ".init_args." in key and not key.endswith("+")


def make_parser_strict(mode: str) -> None:
    """Make all parsers of jsonargparse that work in a mode refuse repeated keys.

    Args:
        mode: The ``parser_mode``: "yaml" or "omegaconf+".
    """
    load = get_loader("yaml") if mode == "yaml" else get_omegaconf_loader(mode)

    def strict(text: str, path: Any = "") -> Any:
        refuse_repeated_keys(text, str(path or ""))
        return load(text)

    set_loader(mode, strict, (yaml.YAMLError,))
