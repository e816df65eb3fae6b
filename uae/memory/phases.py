"""Rows of the memory plan for memory that is in use only in some phases of a training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uae.grpo.output_layer import reordered_bytes
from uae.memory import estimates
from uae.memory.counting import text_config, update_bytes
from uae.memory.flops import WIDTHS
from uae.memory.processes import Processes
from uae.memory.table import Row
from uae.models.captioners.policy import CaptionPolicy
from uae.models.merged import merged_bytes
from uae.systems.blueprints import DRAWS, Blueprint, TokenDrawing
from uae.weights.placement import torch_dtype

QUESTION = 64  # assumed number of tokens of a prompt without its image, and of the template around a caption


@dataclass(frozen=True)
class Sizes:
    """Sizes of a training step in one process.

    Args:
        images: B, the number of images of a rollout.
        group: G, the number of captions per image.
        rows: N, the number of captions of a rollout, or the evaluation batch if that is larger.
        part: Number of images of a mini-batch.
        prompt: P, the number of tokens of a prompt, image included.
        tokens: T, the largest number of tokens of a caption.
        pixels: Number of pixels of a source image.
    """

    images: int
    group: int
    rows: int
    part: int
    prompt: int
    tokens: int
    pixels: int


def rollout_rows(policy: CaptionPolicy, blueprint: Blueprint, sizes: Sizes, processes: Processes) -> list[Row]:
    """Rows of the rollout: sampling of captions, reading of captions by the conditioner, and drawing of images.

    The cache of captions is allocated once, at its full length. What a frozen image tower saw is kept for the update.
    """
    model, config = policy.base, text_config(policy.base)
    b, adapted = model.dtype.itemsize, policy.adapted
    rows = [
        Row(
            "key-value cache",
            estimates.kv_bytes(model, sizes.rows, sizes.prompt + sizes.tokens - 1),
            phases=("caption",),
            keys="sampling.max_tokens, model.group, data.batch_size",
        ),
        _merged_row(policy, blueprint, processes),
        *_reordered_rows(policy, blueprint, processes),
        Row("logits of a sampling step", estimates.sampling_bytes(model, sizes.rows), phases=("caption",)),
        Row("image features", 0 if policy.tower_learns else estimates.feature_bytes(model, sizes.images, sizes.pixels)),
        Row(
            "prompt and image buffers",
            estimates.reading_bytes(config, sizes.images * sizes.prompt, b, adapted)
            + estimates.vision_bytes(model, sizes.images * sizes.pixels, trained=False, recompute=False),
            phases=("caption",),
        ),
    ]
    readers = [network for name, (network, _) in blueprint.frozen.items() if name not in DRAWS]
    read = sizes.rows * (sizes.tokens + QUESTION)
    working = [estimates.reading_bytes(reader.config, read, b) for reader in readers if hasattr(reader, "config")]
    if blueprint.policy_reads:
        working.append(estimates.reading_bytes(config, read, b, adapted))
    if working:
        rows.append(Row("caption reading buffers", max(working), phases=("condition",), keys="sampling.max_tokens, model.group"))
    return rows + _drawing_rows(blueprint, sizes)


def _merged_row(policy: CaptionPolicy, blueprint: Blueprint, processes: Processes) -> Row:
    """Sums of weights and adapter, which exist while the policy acts, see `uae.models.merged`."""
    size = 0 if processes.autocast else merged_bytes(policy.model)
    exact = processes.gathered_dtype in (None, torch.float32, torch.float64)
    phases = ("caption",) if blueprint.drawing is None else ("caption", "render")
    return Row("weights merged with the adapter", size, size if exact else 0, phases, keys="reading.dtype bfloat16")


def _reordered_rows(policy: CaptionPolicy, blueprint: Blueprint, processes: Processes) -> list[Row]:
    """The copies of output layers that `uae.grpo.OutputLayer` keeps on a CPU while captions and image tokens are drawn."""
    if processes.on_gpu:
        return []
    weight = policy.base.get_output_embeddings().weight
    rows = [Row("output head, reordered", reordered_bytes(weight.numel(), weight.dtype), phases=("caption",))]
    if isinstance(blueprint.drawing, TokenDrawing):
        numbers = blueprint.drawing.codes * text_config(policy.base).hidden_size
        rows.append(Row("image head, reordered", reordered_bytes(numbers, policy.base.dtype), phases=("render",)))
    return rows


def _drawing_rows(blueprint: Blueprint, sizes: Sizes) -> list[Row]:
    rendering = blueprint.rendering
    if rendering is None:
        return []
    networks = {name: network for name, (network, _) in blueprint.frozen.items()}
    denoiser, vae = networks.get("transformer", networks.get("unet")), networks.get("vae")
    images = sizes.rows * 3 * rendering.height * rendering.width * 4
    rows = [Row("reconstructions", images, phases=("render", "reward"), keys="model.group, data.batch_size")]
    if blueprint.drawing is not None:  # they have a row among those of image tokens
        rows = []
    if denoiser is None or vae is None:
        return rows
    b, at_once = torch_dtype(rendering.placement).itemsize, min(rendering.rows, sizes.rows)
    width = next((getattr(denoiser.config, name) for name in WIDTHS if getattr(denoiser.config, name, None)), 0)
    condition = sizes.rows * blueprint.condition_tokens * width * b
    denoising = estimates.denoise_bytes(denoiser, vae, rendering, at_once, blueprint.condition_tokens)
    decoding = estimates.decode_bytes(vae, rendering, at_once)
    slow = "rendering.rows" + ("" if denoising > decoding else ", rendering.slice_vae")
    what = "denoising" if denoising > decoding else "decoding"
    rows.append(Row("conditions", condition, phases=("condition", "render"), device=rendering.placement.device))
    rows.append(
        Row(
            f"{what} buffers, {at_once} rows",
            max(denoising, decoding),
            phases=("render",),
            device=rendering.placement.device,
            keys=slow,
        )
    )
    return rows


def update_rows(policy: CaptionPolicy, sizes: Sizes) -> list[Row]:
    """Rows of the update on one mini-batch: activations, cache and output head; and of its log-probs without gradient.

    A frozen image tower does not run here, see `uae.models.captioners.features`.
    """
    model, config, rows = policy.base, text_config(policy.base), sizes.part * sizes.group
    spoken, length = rows * sizes.tokens, sizes.prompt + max(1, sizes.tokens - 1)
    head, mini_batches = model.get_output_embeddings().weight.requires_grad, "model.mini_batches"
    kept = sizes.part * update_bytes(policy, sizes.prompt, sizes.tokens, sizes.group)
    image = 0
    if policy.tower_learns:
        image = estimates.vision_bytes(model, sizes.part * sizes.pixels, True, policy.gradient_checkpointing)
    cache = 0 if policy.gradient_checkpointing else estimates.kv_bytes(model, rows, length)
    adapted = policy.adapted
    reading = estimates.reading_bytes(config, spoken + sizes.part * sizes.prompt, model.dtype.itemsize, adapted)
    keys = mini_batches if policy.gradient_checkpointing else f"{mini_batches}, reading.gradient_checkpointing"
    return [
        Row("activations", kept + image, phases=("update",), keys=keys),
        Row("key-value cache, update", cache, phases=("update",), keys=mini_batches),
        Row("output head", estimates.head_bytes(model, spoken, head), phases=("update", "replay"), keys=mini_batches),
        Row("replay buffers", reading + estimates.kv_bytes(model, rows, length), phases=("replay",), keys=mini_batches),
    ]
