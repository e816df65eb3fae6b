"""Shortens a report of jsonargparse to one line.

A class given by ``class_path`` is validated against a union of types, and jsonargparse reports every branch of the union. The
line says which key is wrong, where it is, and which key was probably meant.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from uae.files.packaged import PREFIX, SUFFIX, names

_NOISE = re.compile(
    r"$|Does not validate against|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
    r"|Not a valid subclass of|Subclass types expect"
)
_REQUIRED = re.compile(r"arguments are required: \w+\.data, \w+\.model")
_EXAMPLE = "such as configs/tiny.yaml"
_UNKNOWN = (
    r"Option '(?P<key>\S+)' is not accepted",
    r"Group '(?P<group>\S+)' does not accept option '(?P<key>\S+)'",
    r"Subcommand '\S+' does not accept option '(?P<key>\S+)'",
    r"unrecognized arguments: (?:--)?(?P<key>[^\s=]+)",
)


def explain(message: str, known: Iterable[str] = ()) -> str:
    """One line that names the wrong key.

    Args:
        message: Report of jsonargparse, often of many lines.
        known: Keys of the parser itself, for suggestions. The keys of classes are looked up.
    """
    if _REQUIRED.search(message):
        return f"no configuration is given: give --config FILE, a complete run {_EXAMPLE}"
    place, owner, problem = _locate(message)
    if place == "config" or not problem:  # a syntax error of a file, or nothing useful was found
        return " ".join(message.split()).replace('Parser key "config": ', "--config: ", 1)
    for pattern in _UNKNOWN:
        if unknown := re.search(pattern, problem):
            return _unknown_key(place, owner, known, **unknown.groupdict())
    return f"{place}: {_plain(problem, message)}" if place else _plain(problem, message)


def _locate(message: str) -> tuple[str, str, str]:
    """Dotted path of the key, class path of the innermost class, and the first useful line."""
    path: list[str] = []
    owner = ""
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if function := re.match(r".*expects a function or a callable class: (.*)", line):
            line = function[1]
            owner = "".join(re.findall(r"class_path='([^']+)'", message)[-1:]) or owner
            path.append("init_args")
        if key := re.match(r'Parser key "([^"]+)":\s*(.*)', line):
            path.append(key[1])
            line = key[2]
        if given := re.match(r"Problem with given class_path '([^']+)':", line):
            owner = given[1]
            path.append("init_args")
        elif not _NOISE.match(line):
            return ".".join(path), owner, line
    return ".".join(path), owner, ""


def _plain(problem: str, message: str) -> str:
    """The problem with readable type names and the wrong value."""
    problem, _, value = problem.partition(" Got value: ")
    if problem.startswith("Expected a") and (choices := re.findall(r"Expected a typing\.Literal\[(.*?)\]", message)):
        problem = f"expected one of {', '.join(choices)}"
    problem = re.sub(r"Expected (?:an? )?<class '(?:\w+\.)*(\w+)'>", r"expected \1", problem).rstrip(".")
    problem = re.sub(r"Expected a dot import path string: (.*)", r"expected the dotted name of a class, got \1", problem)
    problem = re.sub(
        r"Import path (\S+) does not implement protocol (\w+)",
        r"\1 does not implement protocol \2; allowed: a class that has the methods of \2 with the same arguments and annotations "
        "(System: 'def build(self) -> UMM')",
        problem,
    )
    given = value or "".join(re.findall(r"Given value: (.*)", message)[:1]).partition(". Got value: ")[0]
    return f"{problem}, got {given[:80]}" if problem.startswith("expected") and given and "got" not in problem else problem


def _unknown_key(place: str, owner: str, known: Iterable[str], key: str, group: str | None = None) -> str:
    if not owner and (key.endswith(SUFFIX) or key.removeprefix(PREFIX) in names()):
        return f"{key!r} is not accepted: every configuration needs a --config of its own, as in --config tiny --config {key}"
    if not owner:
        close = get_close_matches(key, set(known), n=3)
        return f"key '{key}' is not accepted" + (f"; did you mean {' or '.join(close)}?" if close else "")
    if owner.startswith("lightning.Lightning"):
        return f"no class_path is given (at {place.partition('.')[0]}); the first --config must be a complete run, {_EXAMPLE}"
    if group is None and "." in key:  # a group's key on the command line, or below an unknown one
        head, _, rest = key.partition(".")
        group, key = (head, rest) if head in parameters(owner) else (None, head)
    allowed = parameters(owner, group)
    close = get_close_matches(key, allowed, n=1)
    hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed) or 'none'}"
    return f"key '{key}' is not accepted by {owner} (at {place}{'.' + group if group else ''}); {hint}"


def named(class_path: str) -> Any:
    """What a dotted name names; None if nothing."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def parameters(class_path: str, group: str | None = None) -> list[str]:
    """Names of the parameters of a class, or of the class that its parameter ``group`` takes; empty if unknown."""
    found = named(class_path)
    if group is not None:
        try:
            found = typing.get_type_hints(found.__init__)[group]
        except (AttributeError, KeyError, NameError):
            return []
    names: list[str] = []
    for parent in inspect.getmro(found) if inspect.isclass(found) else ():
        constructor = vars(parent).get("__init__")
        if constructor is None or parent is object:
            continue
        given = inspect.signature(constructor).parameters.values()
        names += [p.name for p in given if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"]
        if not any(p.kind is p.VAR_KEYWORD for p in given):
            break
    return list(dict.fromkeys(names))
