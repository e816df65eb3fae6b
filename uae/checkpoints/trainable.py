"""State dicts that hold trainable parameters only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


def trainable_state(module: nn.Module, state: Mapping[str, T]) -> dict[str, T]:
    """The entries of a state dict that belong to trainable parameters. Tied weights appear once."""
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in state.items() if name in names}


def check_trainable_state(module: nn.Module, state: Mapping[str, Any], path: str | Path | None = None) -> None:
    """Check that a state dict holds exactly the trainable parameters of a module.

    Args:
        module: The module in training.
        state: Name to tensor, or to any object with a ``shape``.
        path: Path of the checkpoint, for the error message.

    Raises:
        ValueError: A parameter is missing, unexpected or of another shape.
    """
    expected = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    found = {name: tuple(value.shape) for name, value in state.items()}
    wrong = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n]),
    }
    faults = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for what, names in wrong.items() if names]
    if faults:
        name = f"checkpoint {str(path)!r}" if path else "the checkpoint"
        raise ValueError(
            f"{name} does not fit what trains here: {'; '.join(faults)}; model.init_args.finetune or "
            "model.init_args.system differs from the run that wrote it"
        )
