"""Clients are Python functions of the user: how a configuration names them, and their names in the cache."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from operator import attrgetter
from types import FunctionType
from typing import Any

KEY = "model.init_args.system.init_args.renderer.init_args"


def import_client(client: str | Callable[..., Any]) -> Callable[..., Any]:
    """Import a client named "package.module:function" or "package.module.function". A function is returned as it is.

    Raises:
        ValueError: There is no such function.
    """
    function: Any = client
    if isinstance(client, str):
        module, _, name = _path(client).partition(":")
        try:
            function = attrgetter(name)(importlib.import_module(module))
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"client={client!r} cannot be imported ({one_line(error)}); allowed: package.module:function; set {KEY}.client"
            ) from error
    if not callable(function):
        raise ValueError(f"client={client!r} is no function; allowed: package.module:function; set {KEY}.client")
    return function


def client_name(client: str | Callable[..., Any], version: str) -> str:
    """The name of a client in the cache, which is the same in every process: "package.module:function".

    Args:
        client: The client or its import path.
        version: Part of the cache's keys; a version other than "" allows names that are not unique.

    Raises:
        ValueError: Other clients could have the same name (lambdas, methods, partials, functions of a script), and there is
            no version.
    """
    if isinstance(client, str):
        return _path(client)
    name = f"{getattr(client, '__module__', '')}:{getattr(client, '__qualname__', type(client).__qualname__)}"
    if not version and (not isinstance(client, FunctionType) or "<" in name or name.startswith("__main__:")):
        raise ValueError(f"the client {name!r} has no name of its own under which its images are cached; set {KEY}.version")
    return name


def one_line(error: BaseException) -> str:
    """Type and message of an exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _path(client: str) -> str:
    module, _, name = client.rpartition(":" if ":" in client else ".")
    return f"{module}:{name}"
