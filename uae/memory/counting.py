"""The bytes that autograd keeps for the backward pass, counted by a forward pass on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uae.models.captioners.caches import cache_argument, library_cache, prompt_cache, recomputing, select
from uae.models.captioners.policy import CaptionPolicy


def update_bytes(policy: CaptionPolicy, prompt: int, tokens: int, group: int) -> int:
    """Bytes that autograd keeps in the language model for the group of one image until the backward pass.

    `CaptionPolicy` reads a prompt of P tokens once, and then G captions of T tokens after its cache. The same two passes are run
    here on the meta device, where tensors have sizes but no values, with hooks that count every saved tensor. So the number
    includes the effects of adapters (which keep a float32 copy of every input), of grouped-query attention (whose keys are
    repeated under a mask) and of dtypes. With gradient checkpointing, one block is added, as one at a time is computed again.

    Args:
        policy: The captioner's network on the meta device, with the weights that train unfrozen.
        prompt: P, number of tokens of the prompt.
        tokens: T, number of tokens of a caption.
        group: G, number of captions.
    """
    whole = _saved_by_reading(policy, prompt, tokens, group, recompute=False)
    if not policy.gradient_checkpointing:
        return whole
    inputs = _saved_by_reading(policy, prompt, tokens, group, recompute=True)
    return inputs + whole // text_config(policy.base).num_hidden_layers


def image_update_bytes(policy: CaptionPolicy, prompt: int, written: int, copies: int) -> int:
    """Bytes that autograd keeps in the language model for one image of tokens: one pass over prompt and tokens.

    Args:
        policy: The network on the meta device, with the weights that train unfrozen.
        prompt: Number of tokens before the image.
        written: Number of tokens of the image. The last one is only predicted, not fed.
        copies: Number of passes with gradient: 2 if the passes with and without the caption both have one, else 1.
    """
    whole = _saved_by_drawing(policy, prompt + written - 1, copies, recompute=False)
    if not policy.gradient_checkpointing:
        return whole
    inputs = _saved_by_drawing(policy, prompt + written - 1, copies, recompute=True)
    return inputs + whole // text_config(policy.base).num_hidden_layers


def steps_update_bytes(policy: CaptionPolicy, prompt: int, written: int, steps: int, guided: int) -> int:
    """Bytes that autograd keeps in the language model for the denoising steps of one image.

    Args:
        policy: The network on the meta device, with the weights that train unfrozen.
        prompt: Number of tokens before the image, which every step computes.
        written: Number of tokens of the image, its marks included.
        steps: Number of steps with gradient.
        guided: Number of those that have a pass without the prompt, too.
    """
    passes = ((prompt, steps), (0, guided))
    whole = [_saved_by_step(policy, before, written, recompute=False) for before, _ in passes]
    if not policy.gradient_checkpointing:
        return sum(each * often for each, (_, often) in zip(whole, passes, strict=True))
    inputs = sum(_saved_by_step(policy, before, written, recompute=True) * often for before, often in passes)
    return inputs + whole[0] // text_config(policy.base).num_hidden_layers


def _saved_by_step(policy: CaptionPolicy, prompt: int, written: int, recompute: bool) -> int:
    length = prompt + written
    sees = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta")
    with saved_bytes(policy) as count, recomputing(policy.model) if recompute else nullcontext():
        policy.base.get_decoder()(**embeds(policy, 1, length), attention_mask=sees, drawn=(prompt + 1, length - 1))
    return count()


def _saved_by_drawing(policy: CaptionPolicy, length: int, rows: int, recompute: bool) -> int:
    with saved_bytes(policy) as count, recomputing(policy.model) if recompute else nullcontext():
        policy.base.get_decoder()(**embeds(policy, rows, length), use_cache=False)
    return count()


def embeds(policy: CaptionPolicy, rows: int, length: int) -> dict[str, Tensor]:
    """Empty input embeddings and positions, the arguments of a decoder, on the meta device."""
    table, width = policy.base.get_input_embeddings().weight, text_config(policy.base).hidden_size
    states = torch.empty(rows, length, width, dtype=table.dtype, device="meta", requires_grad=table.requires_grad)
    return {"inputs_embeds": states, "position_ids": torch.empty(rows, length, dtype=torch.long, device="meta")}


def text_config(model: Any) -> Any:
    """The configuration of a captioner's language model."""
    return model.config.get_text_config(decoder=True)


def _saved_by_reading(policy: CaptionPolicy, prompt: int, tokens: int, group: int, recompute: bool) -> int:
    decoder = policy.base.get_decoder()
    with saved_bytes(policy) as count, recomputing(policy.model) if recompute else nullcontext():
        cache = prompt_cache(policy.base) if recompute else library_cache(policy.base)
        decoder(**embeds(policy, 1, prompt), **cache_argument(decoder, cache), use_cache=True)
        if tokens > 1:
            sees = torch.empty(1, 1, tokens - 1, prompt + tokens - 1, dtype=torch.bool, device="meta")
            longer, one = embeds(policy, group, tokens - 1), torch.zeros(group, dtype=torch.long)
            decoder(**longer, **cache_argument(decoder, select(cache, one)), attention_mask=sees, use_cache=True)
    return count()


@contextmanager
def saved_bytes(module: nn.Module) -> Iterator[Callable[[], int]]:
    """Inside, counts the bytes of tensors that autograd saves. Each storage counts once; the module's weights do not count.

    On the meta device, attention is counted as a fused kernel, which keeps queries, keys, values and output. The meta
    device's own implementation would also keep the matrix of attention scores.
    """
    weights = {id_of(weight) for weight in (*module.parameters(), *module.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no id is used again

    def keep(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in weights:
            storages[id_of(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedOnMeta():
        yield lambda: sum(storage.nbytes() for storage in storages.values())


def id_of(tensor: Tensor) -> int:
    """An id of the memory of a tensor, equal for all its views. Memory on the meta device has an id but no address."""
    return tensor.untyped_storage()._cdata


class _FusedOnMeta(TorchFunctionMode):
    """Replaces attention on the meta device by `_Fused`, and makes ``bool()`` of a meta tensor, which has no value, False."""

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
    """Saves the tensors that fused attention kernels save. It has no backward pass, because none is run here."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out
