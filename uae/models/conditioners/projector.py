"""Loads the MLP projector of UMM-1 from a checkpoint."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from uae.models.conditioners.states import mlp_projector
from uae.weights.state import load_into


def load_projector(state: dict[str, Tensor], width_in: int, key: str, activation: Literal["gelu", "silu"] = "gelu") -> nn.Module:
    """A frozen MLP projector in eval mode. Its widths follow from the weights; UAE's are 2048, 8192 and 4096.

    Args:
        state: The weights ``0.weight``, ``0.bias``, ``2.weight`` and ``2.bias``.
        width_in: Width of the language model's hidden states.
        key: Path of the setting that names the checkpoint, for error messages.
        activation: Activation between the two linear layers, see `uae.models.conditioners.states.mlp_projector`.

    Raises:
        ValueError: The weights are incomplete, or the projector takes states of another width.
    """
    first, last = state.get("0.weight"), state.get("2.weight")
    if first is None or last is None:
        raise ValueError(
            f"the checkpoint has no projector (0.weight and 2.weight after its prefix); set {key} to a complete checkpoint"
        )
    if first.shape[1] != width_in:
        raise ValueError(
            f"the projector of the checkpoint takes states of width {first.shape[1]}, the language model has {width_in}; "
            f"set {key} to one whose parts belong together"
        )
    projector = mlp_projector(first.shape[1], first.shape[0], last.shape[0], activation)
    load_into(projector, state, "projector", key)
    return projector.requires_grad_(False).eval()
