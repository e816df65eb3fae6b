"""Checks that a configuration file holds what a configuration can be read from."""

from __future__ import annotations

import os
from pathlib import Path

import yaml


def check_config_file(path: str | os.PathLike[str]) -> None:
    """Check a file before it is parsed.

    Raises:
        TypeError: The file is not UTF-8, no YAML, not a mapping, or has a key twice, of which YAML would drop one. The parser
            reports errors of this type.
    """
    try:
        root = yaml.compose(Path(path).read_text("utf-8"), yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise TypeError(f"--config {path} is not UTF-8 text (at byte {error.start}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise TypeError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        kinds = {yaml.SequenceNode: "is a list", yaml.ScalarNode: "is a single value"}
        raise TypeError(
            f"--config {path} {kinds.get(type(root), 'is empty')}; allowed: keys with values, as in configs/"
        )
    _check_keys(root, path)


def _check_keys(node: yaml.Node, path: str | os.PathLike[str]) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key.value, str) and key.value != "<<" and (first := seen.setdefault(key.value, line)) != line:
                raise TypeError(
                    f"--config {path} has the key {key.value} in line {first} and again in line {line}: remove one"
                )
    if isinstance(node, yaml.CollectionNode):
        for entry in node.value:
            for inner in entry if isinstance(entry, tuple) else (entry,):
                _check_keys(inner, path)
