"""Rows of the memory plan for networks, gradients and optimizer states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from uae.encoders import HFEncoder, OpenCLIPEncoder
from uae.memory import estimates
from uae.memory.phases import Sizes
from uae.memory.processes import Processes
from uae.memory.table import Row
from uae.models.captioners.policy import CaptionPolicy
from uae.strategy import blocks
from uae.systems.blueprints import DRAWS, Blueprint, encoder_skeleton, open_clip_skeleton
from uae.weights.placement import Placement, torch_dtype

ROLLOUT = ("caption", "condition", "render", "reward", "replay")
DTYPE = "placement.dtype/offload"


def policy_rows(policy: CaptionPolicy, reference: nn.Module | None, processes: Processes, optimizer: Callable[..., Any]) -> list[Row]:
    """Rows for the policy's weights, the weights that FSDP gathers, the reference, gradients and optimizer states."""
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    count, trainable = sum(weight.numel() for weight in policy.parameters()), sum(weight.numel() for weight in trained)
    whole, gradients = estimates.size_of(policy), sum(weight.numel() * weight.element_size() for weight in trained)
    states, known = estimates.optimizer_bytes(optimizer(trained))
    wide = 1.0  # fsdp2 keeps weights that train in float32 if it gathers them in another dtype
    if processes.gathered_dtype is not None and gradients:
        wide = 4 * trainable / gradients
    shards, n = whole + int((wide - 1) * gradients), processes.shards
    gathered, window = _gathered(policy, processes.gathered_dtype)
    rows = [
        Row("policy", whole, shards // n, (), count, trainable, keys="trainer.strategy fsdp2"),
        Row("policy, gathered for the rollout", 0, gathered, ROLLOUT, keys="a smaller captioner"),
        Row("policy, blocks gathered", 0, window, ("update",)),
    ]
    if reference is not None:
        size = estimates.size_of(reference)
        rows.append(Row("reference copy", size, size // n, keys="finetune LoRA, loss.beta 0"))
    per_process = 1 if processes.accumulate > 1 else n
    buckets = 2 if processes.ddp else 1
    name = "gradients, DDP's buckets" if processes.ddp else "gradients"
    lora = "finetune LoRA, trainer.strategy fsdp2"
    rows.append(Row(name, gradients * buckets, int(gradients * wide) // per_process, keys=lora))
    rows.append(Row("optimizer states" + ("" if known else " (as AdamW)"), states, int(states * wide) // n, keys=lora))
    return rows


def _gathered(policy: nn.Module, dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes of the whole policy, as a rollout gathers it; and of the root and two blocks, as an update gathers them."""

    def size(weights: Any) -> int:
        return sum(weight.numel() * (dtype or weight.dtype).itemsize for weight in weights)

    each = [size(block.parameters()) for block in blocks(policy)]
    whole = size(policy.parameters())
    return whole, whole - sum(each) + 2 * max(each, default=0)


def frozen_rows(blueprint: Blueprint) -> list[Row]:
    """Rows for the networks of the conditioner and the renderer, each in its own dtype."""
    rows = []
    for name, (network, placement) in blueprint.frozen.items():
        phase, owner = ("render", "rendering.") if name in DRAWS else ("condition", "the conditioner's ")
        rows.append(_placed(name, network, placement, phase, owner + DTYPE))
    return rows


def _placed(name: str, network: nn.Module, placement: Placement, phase: str, keys: str) -> Row:
    label = f"{name}, {placement.dtype}{', offloaded' if placement.offload else ''}"
    return Row(
        label,
        estimates.placed_bytes(network, placement),
        phases=(phase,) if placement.offload else (),
        parameters=sum(weight.numel() for weight in network.parameters()),
        device=placement.device,
        keys=keys,
    )


def encoder_rows(module: Any, sizes: Sizes) -> list[Row]:
    """Rows for the encoders of rewards and metrics, equal ones once, and for the activations of the largest."""
    rewards = {name: getattr(part, "encoder", None) for name, part in module.reward.parts.items()}
    score = getattr(module.unified_score, "encoders", {})
    towers = towers_of([*rewards.items(), *score.items()])
    rows = [
        _placed(f"encoder {name}", tower, placement, "reward", f"the encoders' {DTYPE}") for name, tower, placement in towers.values()
    ]
    working = [
        estimates.encode_bytes(tower, sizes.rows, torch_dtype(placement).itemsize)
        for _, tower, placement in towers.values()
        if placement.device is None
    ]
    if working:
        rows.append(Row("encoder buffers", max(working), phases=("reward",), keys="model.group, data.batch_size"))
    return rows


def towers_of(encoders: Iterable[tuple[str, Any]]) -> dict[Any, tuple[str, nn.Module, Placement]]:
    """Image towers on the meta device, one for all encoders of equal weights and placement: its name, network, placement.

    Args:
        encoders: Names and encoders; those of other kinds than the two of `uae.encoders`, and None, are left out.
    """
    towers: dict[Any, tuple[str, nn.Module, Placement]] = {}
    for name, encoder in encoders:
        if isinstance(encoder, (HFEncoder, OpenCLIPEncoder)):
            key = encoder.weights(), encoder.placement
            if key not in towers:
                towers[key] = name, _tower(encoder), encoder.placement
    return towers


def _tower(encoder: HFEncoder | OpenCLIPEncoder) -> nn.Module:
    return encoder_skeleton(encoder.path) if isinstance(encoder, HFEncoder) else open_clip_skeleton(encoder.name)
