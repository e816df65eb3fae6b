"""Functions as commands: parameters become options, docstrings become the help."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from uae.cli import debugging, fail
from uae.cli_errors import explain


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
