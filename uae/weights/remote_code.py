"""Checkpoints may bring Python code of their own. It never runs unless a configuration asks for it by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def trusted(name: str, asked: str | None, key: str) -> bool:
    """Whether the code of a checkpoint may run: where ``asked``, the value of ``key``, is the checkpoint's very name.

    Raises:
        ValueError: Something else was asked for, so that trust never passes on to another checkpoint.
    """
    if asked not in (None, name):
        raise ValueError(
            f"{key}={asked!r} trusts the code of a checkpoint that is not read here; allowed: null, or {name!r}"
        )
    return asked is not None


@contextmanager
def refused(name: str, key: str | None = None) -> Iterator[None]:
    """Inside, a library that refuses to run a checkpoint's code becomes one line.

    Args:
        name: Of the checkpoint, as in the configuration.
        key: What allows it; None where nothing does.

    Raises:
        ValueError: The checkpoint cannot be read without its own code.
    """
    try:
        yield
    except Exception as error:
        link: BaseException | None = error
        while link is not None and "trust_remote_code" not in str(link):
            link = link.__cause__ or link.__context__
        if link is None:
            raise
        way = f"read that code, then set {key}={name} to run it" if key else "nothing runs it here: take another checkpoint"
        raise ValueError(f"{name!r} holds Python code of its own and cannot be read without it; {way}") from error
