"""Key-value caches of prompts that work together with gradient checkpointing.

A captioner runs a prompt once, and the captions of a group continue it from its cache, so gradients flow through the cache.
The gradient checkpointing of transformers drops the cache. The one in this file keeps it: layers are computed again in the
backward pass, and the cache is of a kind that the second computation does not change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as remember
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uae.learner import Recomputable


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing: inside, a forward pass keeps only the inputs of text layers and vision blocks.

    Everything else is computed again in the backward pass. Only ``forward`` is wrapped, not ``__call__``, so that hooks
    (for example those that gather the weights of a sharded block) run as usual. The state of the random generator is not
    restored, because a policy has no dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [block for block in model.modules() if isinstance(block, (GradientCheckpointingLayer, Recomputable))]
    before = [block.__dict__.get("forward") for block in blocks]  # some libraries set their own
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
    """Refuse a model whose caches are not known to continue a prompt exactly.

    Raises:
        ValueError: A layer has another kind of cache than keys and values, or linear attention; or the model has linear
            attention and ``gradient_checkpointing`` is set; or text looks at images through layers of cross-attention.
    """
    name = type(model).__name__
    if getattr(model.config.get_text_config(decoder=True), "cross_attention_layers", None):
        raise ValueError(
            f"{name} reads images through layers of cross-attention, whose mask a caption cannot continue; allowed: models that "
            "read images as tokens of the prompt; set model.init_args.system.init_args.captioner to another model"
        )
    kinds = layer_kinds(model)
    if kinds - {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer", "LinearAttentionLayer"}:
        raise ValueError(
            f"{name} caches a prompt as {', '.join(sorted(kinds))}; allowed: keys and values (of all tokens, of a window, or shared "
            "by layers), and linear attention; set model.init_args.system.init_args.captioner to another model"
        )
    if gradient_checkpointing and "LinearAttentionLayer" in kinds:
        raise ValueError(
            f"model.init_args.system.init_args.reading.gradient_checkpointing=true, but {name} has layers of "
            "linear attention, whose state cannot be computed again; set it to false"
        )


def layer_kinds(model: Any) -> set[str]:
    """Names of the classes of transformers in which a model's layers keep a prompt."""
    from transformers import DynamicCache

    return {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument with which a model of transformers takes a cache.

    It is called ``cache`` since transformers 5.24. Before, and in code that a checkpoint brings along, it is
    ``past_key_values``, so the signature decides and not the version. Such a model changes the cache in place.

    Args:
        model: Any model of transformers with a cache, without an adapter around it.
        cache: The cache.
    """
    return {_name_of_cache(type(model).forward): cache}


@remember
def _name_of_cache(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def library_cache(model: Any) -> Any:
    """An empty cache of transformers for a model, whose layers of attention keep all tokens.

    The library drops tokens that have left the window of a layer. What a layer attends to is decided by its mask, which reaches
    over all tokens here, so nothing changes; but captions of several lengths and a second computation can continue the cache.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=model.config)
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def prompt_cache(model: Any) -> Any:
    """An empty cache for a prompt, safe to use where gradient checkpointing computes the prompt's layers twice."""
    from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

    CacheLayerMixin.register(PromptLayer)  # a real subclass would import transformers with this file
    own = library_cache(model).layers
    layers: list[Any] = [layer if type(layer) is DummyLayer else PromptLayer() for layer in own]
    return Cache(layers=layers)


def expand(cache: Any, rows: int, group: int) -> Any:
    """Repeat the cache of ``rows`` prompts for ``group`` continuations of each.

    A cache made by the library is changed in place.
    """
    if any(isinstance(layer, PromptLayer) for layer in cache.layers):
        return select(cache, torch.arange(rows).repeat_interleave(group))
    for layer in cache.layers:
        if hasattr(layer, "batch_repeat_interleave"):
            layer.batch_repeat_interleave(group)
            continue
        layer.reorder_cache(torch.arange(rows).repeat_interleave(group))
        if torch.is_grad_enabled():  # the caption is one pass, and an in-place update would break the gradient
            layer.update_recurrent_state = lambda state, *args, **kwargs: state
    return cache


def has_keys_only(cache: Any) -> bool:
    """Whether all layers of a prompt's cache are keys and values, which `select` can continue in parts."""
    from transformers.cache_utils import DummyLayer, DynamicLayer

    return all(type(layer) in (DynamicLayer, PromptLayer, DummyLayer) for layer in cache.layers)


def select(cache: Any, prompt_N: Tensor) -> Any:
    """A cache for N captions in one pass, of keys and values of prompts, which are not changed.

    Args:
        cache: The cache of the prompts, of keys and values only. Layers that use those of another layer have none.
        prompt_N: Number of the prompt of each caption.
    """
    from transformers.cache_utils import Cache, CacheLayerMixin

    CacheLayerMixin.register(PromptLayer)
    layers: list[Any] = [layer if layer.keys is None else ContinuedLayer(layer.keys, layer.values, prompt_N) for layer in cache.layers]
    return Cache(layers=layers)


class PromptLayer:
    """Keys and values ``[B, H, P, D]`` of a prompt in one layer. The first computation is kept, a second one is ignored."""

    is_sliding = is_compileable = is_croppable = False
    supports_early_init = True

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys, self.values = keys, values

    @property
    def is_initialized(self) -> bool:
        """Whether the layer holds keys."""
        return self.keys is not None

    def get_seq_length(self) -> int:
        """P, the number of tokens in the cache."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_max_length(self) -> int:
        """-1, which transformers reads as unlimited length."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that attention will see, and the position of the first one."""
        return self.get_seq_length() + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the prompt's keys and values and return them for attention."""
        if self.keys is None:
            self.keys, self.values = key_states, value_states
        return key_states, value_states


class ContinuedLayer(PromptLayer):
    """Keys and values of prompts in one layer, for one pass over N captions, whose own are not kept.

    A prompt is repeated for its captions at every use. This happens inside a layer, so that gradient checkpointing does
    not keep the copies.
    """

    def __init__(self, keys: Tensor, values: Tensor, prompt_N: Tensor) -> None:
        super().__init__(keys, values)
        self.prompt_N = prompt_N.to(keys.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[N, H, P + T, D]`` for attention: the prompts, then the captions."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = (x[self.prompt_N] for x in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)
