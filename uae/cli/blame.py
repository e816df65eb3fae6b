"""Which key of the configuration an error belongs to.

The configuration names classes by ``class_path``. When one of them raises an error, the object is in the error's traceback.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from traceback import walk_tb
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI

from uae.cli.explain import named

TRAINER = "lightning.pytorch.Trainer"


class Blamed(NamedTuple):
    """A class that the configuration names, or the trainer.

    Args:
        key: Where its arguments stand, as a user types it. A class that is named in several places has all of them.
        class_path: Its dotted name.
        arguments: What the configuration gives it, defaults included.
        changed: The names of those arguments that are not defaults.
    """

    key: str
    class_path: str
    arguments: dict[str, Any]
    changed: set[str]

    def accused(self, message: str) -> str:
        """The keys and values of the arguments that a message speaks of; else the key, the class and what is given to it.

        A message speaks of at most two arguments: it has their names, or their values, which are no defaults. Best is both.
        """
        words = set(re.findall(r"-?[\w.]*\w", message))
        by_name = [name for name in self.arguments if name in words]
        by_value = [name for name in self.arguments if name in self.changed and str(self.arguments[name]) in words]
        for meant in ([name for name in by_name if name in by_value], by_name, by_value):
            if 1 <= len(meant) <= 2 and " or " not in self.key:
                return ", ".join(f"{self.key}.{name}={self.arguments[name]}" for name in meant)
        if self.class_path == TRAINER:  # most of its arguments are given, and they are of no help together
            return self.key
        given = "".join(f", {name}={self.arguments[name]}" for name in self.arguments if name in self.changed)
        return f"{self.key} ({self.class_path}{given[:200]})"


def blamed(chain: list[BaseException]) -> Blamed | None:
    """The innermost class of the configuration, or the trainer, that was at work when an error was raised; else None.

    Args:
        chain: The error, then its causes.
    """
    found: Blamed | None = None
    known: dict[type, Blamed] = {}
    for error in chain:
        for frame, _ in walk_tb(error.__traceback__):
            worker = frame.f_locals.get("self")
            if isinstance(worker, LightningCLI):
                known = _classes(worker.config[str(worker.config["subcommand"])])
            found = next((known[one] for one in type(worker).__mro__ if one in known), found)
    return found


def _classes(config: Namespace) -> dict[type, Blamed]:
    """The classes of a configuration; the trainer has no class path in it."""
    known: dict[type, Blamed] = {}
    for key, class_path, arguments in [("trainer", TRAINER, vars(config["trainer"])), *_named(config)]:
        of_class = named(class_path)
        if isinstance(of_class, type):
            key = f"{known[of_class].key} or {key}" if of_class in known else key
            plain = {name: value for name, value in arguments.items() if _is_plain(value)}
            defaults = {name: parameter.default for name, parameter in inspect.signature(of_class).parameters.items()}
            changed = {name for name, value in plain.items() if value != defaults.get(name)}
            known[of_class] = Blamed(key, class_path, plain, changed)
    return known


def _named(node: Any, key: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Key, class path and arguments of every class that a configuration names, the outer ones first."""
    if isinstance(node, Namespace):
        node = vars(node)
    if isinstance(node, dict):
        if isinstance(node.get("class_path"), str):
            arguments = node.get("init_args") or {}
            yield (
                f"{key}.init_args",
                node["class_path"],
                vars(arguments) if isinstance(arguments, Namespace) else arguments,
            )
        for name, inner in node.items():
            yield from _named(inner, f"{key}.{name}" if key else name)
    elif isinstance(node, list):
        for inner in node:
            yield from _named(inner, key)


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, (int, float, str))
