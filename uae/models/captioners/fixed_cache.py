"""A key-value cache of a known length, allocated once, so that decoding step by step does not copy a growing tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uae.models.captioners.caches import PromptLayer


def fixed_cache(model: Any, layer_of: Callable[[], FixedLayer]) -> Any:
    """An empty cache, each of whose layers the function makes. Each step writes its own keys and values into it."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    CacheLayerMixin.register(PromptLayer)
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    layers: list[Any] = [layer_of() for _ in range(count)]
    return Cache(layers=layers)


def continued(cache: Any, rows: int, group: int, layer_of: Callable[[int], FixedLayer]) -> Any:
    """Repeat a prompt's cache, made by the library, for captions that are drawn token by token. Changes it in place.

    Args:
        cache: The cache of the prompts.
        rows: Number of prompts.
        group: Captions of each.
        layer_of: Makes an empty layer for prompts of a length.
    """
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer

    CacheLayerMixin.register(PromptLayer)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            assert layer.keys is not None
            assert layer.values is not None
            written = layer_of(layer.keys.shape[2])
            written.update(layer.keys.repeat_interleave(group, 0), layer.values.repeat_interleave(group, 0))
            cache.layers[number] = written
        else:  # linear attention, whose states are of one size; or a layer without keys of its own
            layer.reorder_cache(torch.arange(rows).repeat_interleave(group))
    return cache


class FixedLayer(PromptLayer):
    """One layer's keys and values ``[M, H, P, D]``, allocated once."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.filled = length, 0

    def get_seq_length(self) -> int:
        """Number of tokens in the cache so far."""
        return self.filled

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values and return those of all tokens so far, for attention."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in (key_states, value_states))
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def reorder_cache(self, rows: Tensor) -> None:
        """Keep some rows only, in the order given."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]
