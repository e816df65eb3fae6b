"""A key-value cache of a known length, allocated once, so that decoding step by step does not copy a growing tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from uae.models.captioners.caches import PromptLayer


def fixed_cache(model: Any, length: int) -> Any:
    """A cache for exactly ``length`` tokens. Each step writes its own keys and values into it."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    CacheLayerMixin.register(PromptLayer)
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    layers: list[Any] = [FixedLayer(length) for _ in range(count)]
    return Cache(layers=layers)


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
            self.keys, self.values = (
                x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in (key_states, value_states)
            )
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]
