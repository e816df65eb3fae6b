"""Decoding steps as one compiled function, for GPUs, where the launches of many small kernels take longer than their work.

A compiled step needs tensors whose sizes never change. So attention gets the cache as a whole, with a mask that hides the places
that are not written yet, and no row leaves the batch. On a GPU the step is recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as remember
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from uae.models.captioners.caches import cache_argument, layer_kinds
from uae.models.captioners.fixed_cache import FixedLayer

PIECE = 64  # a cache's length is a multiple of this, so that few lengths are compiled
KEY = "model.init_args.system.init_args.reading.compile"


class Places:
    """The places of a cache of M rows: which ones attention may see, and where the next token goes.

    Args:
        mask_MP: 1 for tokens of the prompt, 0 for padding.
        room: How many tokens will follow.
    """

    def __init__(self, mask_MP: Tensor, room: int) -> None:
        M, P = mask_MP.shape
        self.length = -(-(P + room) // PIECE) * PIECE
        self.seen_M11L = mask_MP.new_zeros(M, 1, 1, self.length, dtype=torch.bool)
        self.seen_M11L[:, 0, 0, :P] = mask_MP.bool()
        self.next = torch.tensor([P], device=mask_MP.device)

    def step(self, network: nn.Module, inputs: dict[str, Tensor], cache: Any) -> Tensor:
        """Feed one token of every row and return its final hidden states ``[M, 1, D]``.

        Args:
            network: A model of transformers.
            inputs: Arguments of its forward for one token of every row: ids or embeddings, and positions.
            cache: Its cache, with layers of `WholeLayer`.
        """
        self.seen_M11L.index_fill_(3, self.next, True)
        arguments = {**inputs, **cache_argument(network, cache), "attention_mask": self.seen_M11L, "use_cache": True}
        hidden_M1D: Tensor = _compiled(self.next.device.type)(network, arguments)
        self.next += 1
        return hidden_M1D.clone()  # the next replay of a CUDA graph writes over its outputs


class WholeLayer(FixedLayer):
    """One layer's keys and values ``[M, H, L, D]``. A prompt is written at once, then tokens one by one."""

    def __init__(self, places: Places) -> None:
        super().__init__(places.length)
        self.next = places.next

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values and return those for attention: of a prompt its own, of a token all places."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (x.new_zeros(*x.shape[:2], self.length, x.shape[3]) for x in (key_states, value_states))
            self.filled = key_states.shape[2]
            self.keys[:, :, : self.filled] = key_states
            self.values[:, :, : self.filled] = value_states
            if self.keys.is_cuda:
                for x in (self.keys, self.values, self.next):
                    torch._dynamo.mark_static_address(x)  # a graph that writes into its inputs needs them where they were
            return key_states, value_states
        self.keys.index_copy_(2, self.next, key_states)
        self.values.index_copy_(2, self.next, value_states)
        return self.keys, self.values


def check_steps(model: Any) -> None:
    """Refuse a model whose decoding steps cannot be compiled.

    Raises:
        ValueError: Its attention takes no mask over the whole cache, or it has layers of linear attention.
    """
    attention = model.config._attn_implementation
    kinds = layer_kinds(model)
    if attention != "sdpa" or kinds != {"DynamicLayer"}:
        raise ValueError(
            f"{KEY}=true, but {type(model).__name__} has attention {attention!r} and caches of {', '.join(sorted(kinds))}; "
            f"allowed: sdpa, and keys and values of all tokens; set {KEY} to false"
        )


def check_whole(network: nn.Module) -> None:
    """Refuse a sharded network: its weights are gathered by hooks, which a compiled step does not run.

    Raises:
        ValueError: The network is sharded.
    """
    if any(isinstance(module, FSDPModule) for module in network.modules()):
        raise ValueError(f"{KEY}=true, but trainer.strategy shards the policy; set {KEY} to false, or trainer.strategy to ddp")


@remember
def _compiled(device: str) -> Callable[[nn.Module, dict[str, Any]], Tensor]:
    """The compiled step of all networks on a kind of device. Torch compiles it anew for every network and size."""
    return torch.compile(_step, dynamic=False, mode="reduce-overhead" if device == "cuda" else None)


def _step(network: nn.Module, arguments: dict[str, Any]) -> Tensor:
    hidden_M1D: Tensor = network(**arguments).last_hidden_state
    return hidden_M1D
