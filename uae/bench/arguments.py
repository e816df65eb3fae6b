"""Functions as commands: parameters become options, docstrings become the help."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from uae.cli import debugging, fail
from uae.cli.explain import explain


class Parser(ArgumentParser):
    """Abbreviations are errors, and an error is one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and the line that helps."""
        if debugging():
            super().error(message, ex)
        fail(explain(message, [action.dest for action in self._actions]))


def run(name: str, functions: Callable[..., Any] | Mapping[str, Callable[..., Any]], args: Sequence[str]) -> Any:
    """Parse ``args`` for a function, or for the one of several that the first argument names, and call it.

    Args:
        name: The command, for its usage line.
        functions: One function, or name to function. All options are keywords, and may come from ``--config FILE``.
        args: What the user typed behind the command.
    """
    components: Any = functions if callable(functions) else dict(functions)
    return auto_cli(components, args=list(args), as_positional=False, parser_class=Parser, prog=f"python -m uae.bench {name}")


def listed(args: Sequence[str], option: str) -> list[str]:
    """Arguments in which ``--option a b c`` became one list, as the parser reads lists."""
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
