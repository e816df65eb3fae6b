"""Command lines from functions: parameters become options, docstrings become the help text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from uae.cli import debugging, fail
from uae.cli.config_file import check_config_file
from uae.cli.explain import explain
from uae.files.settings import make_parser_strict

Function = Callable[..., Any]
make_parser_strict("yaml")


class Parser(ArgumentParser):
    """A parser that refuses abbreviated options and reports an error in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # jsonargparse passes whatever argparse takes
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a file that can be one."""
        check_config_file(cfg_path)
        return super().parse_path(cfg_path, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line about what is wrong and what is allowed, and exit with status 2."""
        if debugging():
            super().error(message, ex)
        fail(explain(message, [action.dest for action in self._actions]))


def run(name: str, functions: Function | Mapping[str, Function], args: Sequence[str]) -> Any:
    """Parse ``args`` as the options of a function and call it.

    Args:
        name: Name of the command, for the usage text.
        functions: One function; or several by name, of which the first argument chooses one. All parameters become options
            ``--name``, which ``--config FILE`` may also hold.
        args: The words that the user typed behind the command's name.

    Returns:
        What the function returns.
    """
    components: Any = functions if callable(functions) else dict(functions)  # jsonargparse declares only literal nestings
    return auto_cli(components, args=list(args), as_positional=False, parser_class=Parser, prog=f"python -m uae.bench {name}")


def listed(args: Sequence[str], option: str) -> list[str]:
    """Join ``--option a b c`` into one list ``--option ["a", "b", "c"]``, which is how the parser reads lists."""
    rest, values = [], []
    words = list(args)
    while words:
        word = words.pop(0)
        if word != option:
            rest.append(word)
            continue
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
    if len(values) == 1 and values[0].startswith("["):  # a list already
        return [*rest, option, *values]
    return [*rest, option, json.dumps(values)] if values else rest
