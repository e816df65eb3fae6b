"""Key-value caches that are written in place, so that decoding step by step does not copy a growing tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uae.models.captioners.caches import PromptLayer

ROOM = 64  # tokens that a cache is enlarged by, if its length is not known before


def fixed_cache(model: Any, length: int) -> Any:
    """A cache for exactly ``length`` tokens. Each step writes its own keys and values into it."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    CacheLayerMixin.register(PromptLayer)
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    layers: list[Any] = [FixedLayer(length) for _ in range(count)]
    return Cache(layers=layers)


def continued(cache: Any, group: int) -> Any:
    """Repeat a prompt's cache, made by the library, for ``group`` captions that are drawn token by token. Changes it in place."""
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer

    CacheLayerMixin.register(PromptLayer)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            assert layer.keys is not None
            assert layer.values is not None
            written = FixedLayer(layer.keys.shape[2] + ROOM)
            written.update(layer.keys.repeat_interleave(group, 0), layer.values.repeat_interleave(group, 0))
            cache.layers[number] = written
        else:  # linear attention has states of one size
            rows = next(state for state in layer.conv_states.values() if state is not None)
            layer.reorder_cache(torch.arange(len(rows), device=rows.device).repeat_interleave(group))
    return cache


class FixedLayer(PromptLayer):
    """One layer's keys and values ``[M, H, P, D]`` in tensors that have room for more tokens.

    Args:
        length: Number of tokens that there is room for at first. More room is made `ROOM` tokens at a time.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.filled = length, 0

    def get_seq_length(self) -> int:
        """Number of tokens in the cache so far."""
        return self.filled

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values and return those of all tokens so far, for attention."""
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        if self.keys is None or self.values is None or self.filled > self.length:
            self.length = max(self.length, self.filled + ROOM * (start > 0))
            self.keys, self.values = self._room(self.keys, key_states, start), self._room(self.values, value_states, start)
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def _room(self, held: Tensor | None, new: Tensor, filled: int) -> Tensor:
        room = new.new_empty(*new.shape[:2], self.length, new.shape[3])
        if held is not None:
            room[:, :, :filled] = held[:, :, :filled]
        return room

    def reorder_cache(self, rows: Tensor) -> None:
        """Keep some rows only, in the order given."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]
