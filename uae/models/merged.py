"""An adapter as part of the weights, while a policy acts: one product per layer instead of three.

Only where the whole computation is in float32 or float64. In bfloat16 the sum would be rounded to what bfloat16 can hold, and the
sampler would be another policy than the one that learns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class _Sum(nn.Module):
    """A linear layer with the sum of a weight and what an adapter adds to it; neither of both is a parameter of it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return nn.functional.linear(x, self.weight, self.bias)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, and without gradient, linear layers with a LoRA compute with the sum of both. No weight is changed.

    Layers stay as they are where the sum would not be exact, or would not be the same: weights of 16 bit or less, autocast,
    another variant than plain LoRA, several adapters or none at work, weights that are sharded at the time.

    Args:
        model: A model, with or without a PeftModel around it.
    """
    device = next(model.parameters()).device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # torch refuses the question on the meta device
    replaced = [] if autocast else _plain_layers(model)
    try:
        with torch.no_grad():
            for parent, name, layer in replaced:
                parent._modules[name] = _sum(layer)
        yield
    finally:
        for parent, name, layer in replaced:
            parent._modules[name] = layer


def merged_bytes(model: nn.Module) -> int:
    """Bytes of the sums that exist inside `merged` where there is no autocast."""
    return sum(layer.base_layer.weight.nbytes for _, _, layer in _plain_layers(model))


def _plain_layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Parent, name and layer of every linear layer that can be replaced by a sum."""
    if not hasattr(model, "peft_config"):
        return []
    children = ((parent, *child) for parent in list(model.modules()) for child in parent.named_children())
    return [(parent, name, layer) for parent, name, layer in children if _is_plain(layer)]


def _is_plain(layer: Any) -> bool:
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (adapter,) = layer.active_adapters
    base = layer.base_layer
    exact = base.weight.dtype in (torch.float32, torch.float64) and not isinstance(base.weight, DTensor)
    plain = adapter in layer.lora_A and adapter not in layer.lora_variant and not layer.lora_bias.get(adapter)
    return type(base) is nn.Linear and exact and plain


def _sum(layer: Any) -> _Sum:
    (adapter,) = layer.active_adapters
    base = layer.base_layer
    bias = None if base.bias is None else base.bias.detach()
    weight = base.weight + layer.get_delta_weight(adapter).to(base.weight.dtype)
    if weight.device.type == "cpu":
        weight = weight.t().contiguous().t()  # stored transposed: products with few rows are then faster
    return _Sum(weight, bias)
