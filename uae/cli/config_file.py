"""Checks that a configuration file holds what a configuration can be read from."""

from __future__ import annotations

import os
from pathlib import Path

import yaml


def check_config_file(path: str | os.PathLike[str]) -> None:
    """Check a file before it is parsed.

    Raises:
        TypeError: The file is not UTF-8, no YAML, or not a mapping. The parser reports errors of this type.
    """
    try:
        root = yaml.compose(Path(path).read_text("utf-8"), yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise TypeError(f"--config {path} is not UTF-8 text (at byte {error.start}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise TypeError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        kinds = {yaml.SequenceNode: "is a list", yaml.ScalarNode: "is a single value"}
        raise TypeError(f"--config {path} {kinds.get(type(root), 'is empty')}; allowed: keys with values, as in configs/")
