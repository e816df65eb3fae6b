"""Low-rank adapters as plain tensors: told apart from the weights they adapt, and added to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>\w+))?\.weight$")
BASE = ".base_layer."  # PEFT moves the adapted layer below this name
Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> A [rank, in], B [out, rank]


def split_adapter(state: Mapping[str, Tensor], adapter: str = "default") -> tuple[dict[str, Tensor], Factors]:
    """The plain weights of a model with low-rank layers, under their plain names, and one adapter's factors.

    Args:
        state: A state dict as PEFT names it, with or without adapter names, without ``base_model.model.``.
        adapter: Which one; the factors of others are dropped.

    Raises:
        ValueError: A factor lacks its other half or its layer, or the adapter is more than two factors a layer.
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
        raise ValueError(
            f"the adapter has one factor of two in {len(halves)} layers (e.g. {halves[0]}); the file is incomplete"
        )
    return weights, {layer: (pair["A"], pair["B"]) for layer, pair in sides.items()}


def check_low_rank(names: Iterable[str]) -> None:
    """Raise unless an adapter consists of two factors a layer and nothing else.

    Raises:
        ValueError: It has magnitudes, embeddings, biases or copies of whole modules.
    """
    other = [name for name in names if ("lora_" in name or "modules_to_save" in name) and not FACTOR.match(name)]
    if other:
        raise ValueError(
            f"the adapter is more than two factors a layer (e.g. {other[0]}) and cannot be merged; use plain LoRA, or keep "
            "the adapter separate"
        )


def merge_adapter(
    weights: Mapping[str, Tensor], factors: Factors, scale: Callable[[str, int], float]
) -> dict[str, Tensor]:
    """``W + scale * B A`` for every adapted layer, in float32: rounding is left to whoever loads it.

    Args:
        weights: By plain name.
        factors: By layer.
        scale: Of a layer of a rank; PEFT's is ``alpha / rank``.

    Raises:
        ValueError: A layer is not among the weights, or its shape differs.
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
