"""Some checkpoints contain Python code. It runs only if the configuration names that checkpoint in ``trust_remote_code``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def trusted(name: str, asked: str | None, key: str) -> bool:
    """Whether the code in a checkpoint may run. It may if the user's setting holds the name of exactly this checkpoint.

    Args:
        name: Name of the checkpoint as in the configuration.
        asked: Value of the user's setting: the name of the trusted checkpoint, or None for none.
        key: Path of that setting, for the error message.

    Raises:
        ValueError: The setting names another checkpoint. Trust must not pass to a checkpoint that the user did not name.
    """
    if asked not in (None, name):
        raise ValueError(f"{key}={asked!r} trusts the code of a checkpoint that is not read here; allowed: null or {name!r}")
    return asked is not None


@contextmanager
def refused(name: str, key: str | None = None) -> Iterator[None]:
    """Turn a library's refusal to run the code of a checkpoint into an error of one line.

    Args:
        name: Name of the checkpoint as in the configuration.
        key: Path of the setting that allows the code to run; None if no setting does.

    Raises:
        ValueError: The checkpoint cannot be read without running its code.
    """
    try:
        yield
    except Exception as error:
        link: BaseException | None = error
        while link is not None and "trust_remote_code" not in str(link):
            link = link.__cause__ or link.__context__
        if link is None:
            raise
        way = f"read that code, then set {key}={name} to run it" if key else "nothing runs it here: use another checkpoint"
        raise ValueError(f"{name!r} holds Python code of its own and cannot be read without it; {way}") from error
