"""Caches of a prompt that a group of captions continues, and gradient checkpointing that keeps them.

A captioner runs its prompt once and continues it with a whole group, so gradients flow through the cache. transformers'
own checkpointing drops the cache. Here every block is recomputed on the way back as well, beside a cache that
recomputing cannot change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside, a forward pass keeps the input of every text layer and vision block, and computes the rest again.

    What is wrapped is ``forward``, not the call: hooks (those that gather a sharded block's weights, for one) run as they
    would without. Random numbers are not kept, as a policy has no dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)]
    before = [block.__dict__.get("forward") for block in blocks]  # some libraries put their own there
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def check_memory(model: Any, gradient_checkpointing: bool) -> None:
    """Refuse a model whose layers remember a prompt in a way that has not been shown to be continued exactly.

    Raises:
        ValueError: There is such a layer.
    """
    from transformers import DynamicCache

    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if kinds - {"DynamicLayer", "LinearAttentionLayer"}:
        raise ValueError(
            f"{type(model).__name__} remembers a prompt as {', '.join(sorted(kinds))}; allowed: keys and values of all "
            "tokens, and linear attention; set system.init_args.captioner to another model"
        )
    if gradient_checkpointing and kinds != {"DynamicLayer"}:
        raise ValueError(
            f"reading.gradient_checkpointing=true, but {type(model).__name__} has layers of linear attention, which "
            "overwrite what would be computed again; set it to false"
        )


def prompt_cache(model: Any) -> Any:
    """An empty cache for a prompt whose pass may be computed again."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    CacheLayerMixin.register(PromptLayer)  # as good as a subclass, without importing the library at the top
    layers: list[Any] = [PromptLayer() for _ in range(model.config.get_text_config(decoder=True).num_hidden_layers)]
    return Cache(layers=layers)


def expand(cache: Any, rows: int, group: int) -> Any:
    """The cache of ``rows`` prompts for ``group`` continuations of each. The library's own is changed in place."""
    from transformers import Cache

    if all(isinstance(layer, PromptLayer) for layer in cache.layers):
        layers: list[Any] = [ContinuedLayer(layer.keys, layer.values, group) for layer in cache.layers]
        return Cache(layers=layers)
    for layer in cache.layers:
        if hasattr(layer, "batch_repeat_interleave"):
            layer.batch_repeat_interleave(group)
            continue
        layer.reorder_cache(torch.arange(rows).repeat_interleave(group))
        if torch.is_grad_enabled():  # captions are fed at once; overwriting the state would break its gradient
            layer.update_recurrent_state = lambda state, *args, **kwargs: state
    return cache


class PromptLayer:
    """One layer's keys and values ``[B, H, P, D]`` of a prompt: kept when first computed, not when computed again."""

    is_sliding = is_compileable = is_croppable = False

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys, self.values = keys, values

    @property
    def is_initialized(self) -> bool:
        """Whether there are keys."""
        return self.keys is not None

    def get_seq_length(self) -> int:
        """P, tokens so far."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that attention will see."""
        return self.get_seq_length() + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention sees: the prompt itself."""
        if self.keys is None:
            self.keys, self.values = key_states, value_states
        return key_states, value_states


class ContinuedLayer(PromptLayer):
    """A prompt's keys and values before a group of captions, which are fed at once and not kept.

    The group's copies of the prompt are made at every use: inside a block, so that they are not kept either.
    """

    def __init__(self, keys: Tensor, values: Tensor, group: int) -> None:
        super().__init__(keys, values)
        self.group = group

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention sees: ``[B*group, H, P + T, D]``."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = (x.repeat_interleave(self.group, 0) for x in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)
