"""What a backward pass keeps, counted by running the forward pass where nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uae.models.captioners.caches import expand, prompt_cache, recomputing
from uae.models.captioners.policy import CaptionPolicy


def update_bytes(policy: CaptionPolicy, prompt: int, tokens: int, group: int) -> int:
    """Bytes that autograd keeps in the language model for one image's group, until the backward pass.

    Counted, not modelled: `CaptionPolicy` reads a prompt of P tokens once and G captions of T tokens behind its cache; the
    same two passes run on the meta device under hooks that see every saved tensor. So adapters (which keep a float32 copy
    of every input), grouped-query attention (whose keys are repeated under a mask) and precision are what they are.
    With gradient checkpointing, the inside of the block that is being computed again comes on top.

    Args:
        policy: On the meta device, with what trains unfrozen.
        prompt: P, tokens.
        tokens: T, tokens.
        group: G, captions.
    """
    whole = _saved_by_reading(policy, prompt, tokens, group, recompute=False)
    if not policy.gradient_checkpointing:
        return whole
    inputs = _saved_by_reading(policy, prompt, tokens, group, recompute=True)
    return inputs + whole // text_config(policy.base).num_hidden_layers


def image_update_bytes(policy: CaptionPolicy, prompt: int, written: int, copies: int) -> int:
    """Bytes that autograd keeps in the language model for one image of tokens: one pass over prompt and tokens.

    Args:
        policy: On the meta device, with what trains unfrozen.
        prompt: Tokens before the image.
        written: Tokens of the image, as they are fed; the last is predicted only.
        copies: Passes with gradient: two where guidance has both.
    """
    whole = _saved_by_drawing(policy, prompt + written - 1, copies, recompute=False)
    if not policy.gradient_checkpointing:
        return whole
    inputs = _saved_by_drawing(policy, prompt + written - 1, copies, recompute=True)
    return inputs + whole // text_config(policy.base).num_hidden_layers


def _saved_by_drawing(policy: CaptionPolicy, length: int, rows: int, recompute: bool) -> int:
    with saved_bytes(policy) as count, recomputing(policy.model) if recompute else nullcontext():
        policy.base.get_decoder()(**_embeds(policy, rows, length), use_cache=False)
    return count()


def _embeds(policy: CaptionPolicy, rows: int, length: int) -> dict[str, Tensor]:
    """What a decoder is given in place of token ids."""
    words, width = policy.base.get_input_embeddings().weight, text_config(policy.base).hidden_size
    states = torch.empty(rows, length, width, dtype=words.dtype, device="meta", requires_grad=words.requires_grad)
    return {"inputs_embeds": states, "position_ids": torch.empty(rows, length, dtype=torch.long, device="meta")}


def text_config(model: Any) -> Any:
    """The configuration of a captioner's language model."""
    return model.config.get_text_config(decoder=True)


def _saved_by_reading(policy: CaptionPolicy, prompt: int, tokens: int, group: int, recompute: bool) -> int:
    decoder = policy.base.get_decoder()
    with saved_bytes(policy) as count, recomputing(policy.model) if recompute else nullcontext():
        cache = prompt_cache(policy.base) if recompute else None
        cache = decoder(**_embeds(policy, 1, prompt), past_key_values=cache, use_cache=True).past_key_values
        if tokens > 1:
            sees = torch.empty(1, 1, tokens - 1, prompt + tokens - 1, dtype=torch.bool, device="meta")
            cache = expand(cache, 1, group)
            decoder(**_embeds(policy, group, tokens - 1), attention_mask=sees, past_key_values=cache, use_cache=True)
    return count()


@contextmanager
def saved_bytes(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Inside, counts the memory of saved tensors, each storage once and the module's own weights not at all.

    On the meta device, attention is counted as a fused kernel: it keeps queries, keys, values and its output, never
    the matrix of scores, which meta's own fallback would.
    """
    weights = {id_of(weight) for weight in (*module.parameters(), *module.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no number is given twice

    def keep(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in weights:
            storages[id_of(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedOnMeta():
        yield lambda: sum(storage.nbytes() for storage in storages.values())


def id_of(tensor: Tensor) -> int:
    """The same for all views of one memory, also on the meta device, which has no addresses."""
    return tensor.untyped_storage()._cdata


class _FusedOnMeta(TorchFunctionMode):
    """Attention without its scores; and whatever is asked about values that do not exist is answered with no."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            if given["query"].is_meta:
                return _Fused.apply(given["query"], given["key"], given["value"])
        if function is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        return function(*args, **kwargs)


class _Fused(torch.autograd.Function):
    """Keeps what the fused kernels keep; nothing on the meta device has a backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out
