"""Low-rank adapters (LoRA, arXiv 2106.09685) as plain tensors: split from the weights they adapt, or merged into them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>\w+))?\.weight$")
BASE = ".base_layer."  # PEFT stores the adapted layer under this name
Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> A [rank, in], B [out, rank]


def split_adapter(state: Mapping[str, Tensor], adapter: str = "default") -> tuple[dict[str, Tensor], Factors]:
    """Split a state dict of PEFT into the weights of the model under their original names, and the factors of one adapter.

    Args:
        state: State dict with the names of PEFT, with or without the adapter's name, without ``base_model.model.``.
        adapter: Name of the adapter; the factors of other adapters are dropped.

    Raises:
        ValueError: A layer has only one of its two factors, or the adapter is no plain LoRA.
    """
    check_low_rank(state)
    weights: dict[str, Tensor] = {}
    sides: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = FACTOR.match(name)
        if not match:
            weights[name.replace(BASE, ".")] = value
        elif match["adapter"] in (None, adapter):
            sides.setdefault(match["layer"], {})[match["side"]] = value
    halves = sorted(layer for layer, pair in sides.items() if len(pair) < 2)
    if halves:
        raise ValueError(f"the adapter has one factor of two in {len(halves)} layers (e.g. {halves[0]}); the file is incomplete")
    return weights, {layer: (pair["A"], pair["B"]) for layer, pair in sides.items()}


def check_low_rank(names: Iterable[str]) -> None:
    """Check that an adapter is plain LoRA, which has exactly two factors per layer.

    Raises:
        ValueError: The adapter has magnitudes, embeddings, biases or copies of whole modules.
    """
    other = [name for name in names if ("lora_" in name or "modules_to_save" in name) and not FACTOR.match(name)]
    if other:
        raise ValueError(
            f"the adapter is more than two factors a layer (e.g. {other[0]}) and cannot be merged; use plain LoRA, or keep "
            "the adapter separate"
        )


def merge_adapter(weights: Mapping[str, Tensor], factors: Factors, scale: Callable[[str, int], float]) -> dict[str, Tensor]:
    """Weights with ``W + scale * B A`` for every adapted layer. Merged weights are float32 and not rounded.

    Args:
        weights: Weights by name.
        factors: ``A`` of shape ``[rank, in]`` and ``B`` of shape ``[out, rank]`` by layer.
        scale: Function of a layer's name and rank; PEFT's is ``alpha / rank``.

    Raises:
        ValueError: The weights lack an adapted layer, or its shape differs.
    """
    merged = dict(weights)
    for layer, (A, B) in factors.items():
        weight = merged.get(f"{layer}.weight")
        if weight is None or weight.shape != (B.shape[0], A.shape[1]):
            found = "which is not there" if weight is None else f"whose shape is {list(weight.shape)}"
            raise ValueError(
                f"the adapter ([{B.shape[0]}, {A.shape[1]}], rank {A.shape[0]}) is for {layer}, {found}; adapter and weights "
                "do not belong together"
            )
        delta = (B.float() @ A.float()) * scale(layer, A.shape[0])
        merged[f"{layer}.weight"] = weight.float() + delta
    return merged
