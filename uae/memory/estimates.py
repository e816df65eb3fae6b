"""Formulas for the memory of a run, except for saved activations. Tests compare them with counted bytes.

Sizes are named as in `uae.types`. In addition, P is the number of prompt tokens, L of conditioning tokens, M = N*T of caption
tokens of a mini-batch, and b is the number of bytes per value.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from uae.grpo.logprobs import CHUNK
from uae.memory.counting import text_config
from uae.models.renderers.diffusers import Rendering
from uae.weights.placement import Placement, torch_dtype

CUDA_CONTEXT = 1 << 30  # a process takes 0.5 to 1 GiB for driver and kernels before its first tensor
BLOCK_VALUES, PARALLEL_BLOCK_VALUES = 11, 18  # live values per token and width; see `denoise_bytes`
PIXEL_VALUES, VIDEO_PIXEL_VALUES = 6.6, 18.2  # live values per pixel and channel; see `decode_bytes`
TOWER_VALUES = 17  # live values per token and width; see `encode_bytes`


def size_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers in their own dtype; tied parameters count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def placed_bytes(module: nn.Module, placement: Placement) -> int:
    """Bytes of a frozen network in its placement's dtype.

    "float8" stores matrices and kernels in one byte per value and vectors (norms, biases) in two.
    """
    floats = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    if placement.dtype == "float8":
        return sum(tensor.numel() * (1 if tensor.ndim > 1 else 2) for tensor in floats)
    return sum(tensor.numel() for tensor in floats) * torch_dtype(placement).itemsize


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, bool]:
    """Bytes of optimizer states, counted after one step on the meta device; and whether that step was possible.

    AdamW keeps two values per parameter in the parameter's dtype and one float32 number of steps per tensor. An optimizer
    that cannot run on the meta device (8-bit ones) is counted as AdamW with float32 states, 8 bytes per parameter.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError, TypeError):
        return sum(weight.numel() * 8 for weight in weights), False
    finally:
        for weight in weights:
            weight.grad = None
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, Tensor)), True


def kv_bytes(model: Any, rows: int, tokens: int) -> int:
    """Bytes of a key-value cache: 2 * layers * KV heads * head width * b, per row and token; linear attention keeps none."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = len(kinds) - kinds.count("linear_attention")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * layers * heads * width * model.dtype.itemsize * rows * tokens


def sampling_bytes(model: Any, rows: int) -> int:
    """Bytes of one sampling step of `HFCaptioner.sample`: float32 log-probs and two float64 copies, ``[N, V]``; 20 V per row."""
    return 20 * rows * text_config(model).vocab_size


def head_bytes(model: Any, tokens: int, trained: bool) -> int:
    """Bytes of `uae.grpo.token_logprobs` for M tokens.

    At most three float32 ``[chunk, V]`` at a time and, per token, a float32 slope ``[M, D]`` beside the hidden state; a head that
    trains keeps no slope but gathers its gradient in float32 ``[V, D]``, and has that of one chunk beside it.
    """
    config = text_config(model)
    states = tokens * config.hidden_size * model.dtype.itemsize
    kept = 2 * config.vocab_size * config.hidden_size * 4 if trained else tokens * config.hidden_size * 4
    return 3 * 4 * min(tokens, CHUNK) * config.vocab_size + states + kept


def reading_bytes(config: Any, tokens: int, itemsize: int, adapted: bool = False) -> int:
    """Bytes of one layer of a language model over ``tokens`` tokens, without gradient: (3 F + 6 D) b per token.

    F is the width inside the MLP (gate, up and their product), D outside (residual, norm, queries, keys, values, output).
    An adapter computes in float32, on a copy of its input: 4 F more.
    """
    widths = (("hidden_size", "d_model"), ("intermediate_size", "d_ff"))
    width, inside = (next((getattr(config, name) for name in names if hasattr(config, name)), 0) for names in widths)
    return ((3 * inside + 6 * width) * itemsize + (4 * inside if adapted else 0)) * tokens


def denoise_bytes(denoiser: Any, vae: Any, rendering: Rendering, rows: int, condition_tokens: int) -> int:
    """Bytes of one denoising pass: rows * (2 with guidance) * (S + L) * width * 11 b.

    11 live values per token and width inside a block; 18 where attention and MLP run side by side (FLUX). Counted on the
    meta device: Stable Diffusion 3.5 Large 10.3, Sana 8.1, FLUX.1 17.5.
    """
    config = denoiser.config
    width = getattr(config, "hidden_size", 0) or getattr(config, "num_attention_heads", 0) * getattr(config, "attention_head_dim", 0)
    if not isinstance(width, int) or not width:  # a U-Net: convolutions at full resolution dominate
        width = config.block_out_channels[0]
    parallel = getattr(config, "num_single_layers", 0)
    values = PARALLEL_BLOCK_VALUES if parallel else BLOCK_VALUES
    passes = rows * (2 if rendering.guidance > 1 else 1)
    tokens = latent_tokens(config, vae.config, rendering.height, rendering.width) + condition_tokens
    return passes * tokens * width * values * torch_dtype(rendering.placement).itemsize


def latent_tokens(denoiser: Any, vae: Any, height: int, width: int) -> int:
    """S, the number of tokens of an image: its latent pixels, grouped in patches by the denoiser or by the pipeline."""
    channels = getattr(vae, "latent_channels", None) or getattr(vae, "z_dim", None) or denoiser.in_channels
    packed = denoiser.in_channels // channels
    patch = packed if packed > 1 else (getattr(denoiser, "patch_size", None) or 1) ** 2
    factor = downsampling(vae)
    return math.ceil(height / factor) * math.ceil(width / factor) // patch


def downsampling(vae: Any) -> int:
    """Side of the square of pixels that one latent pixel stands for."""
    for name, extra in (("encoder_block_out_channels", -1), ("block_out_channels", -1), ("temperal_downsample", 0)):
        if getattr(vae, name, None):
            return 2 ** (len(getattr(vae, name)) + extra)
    return 8


def decode_bytes(vae: Any, rendering: Rendering, rows: int) -> int:
    """Bytes of decoding latents: rows * H * W * channels at full resolution * 6.6 b (video autoencoders 18.2 b).

    Counted on the meta device: 6.0 (Stable Diffusion 3 and FLUX), 6.5 (Sana) and 18.0 (Qwen-Image). One row at a time if
    sliced, a tile of 512 x 512 pixels at most if tiled.
    """
    config = vae.config
    channels = next(
        (getattr(config, name)[0] for name in ("decoder_block_out_channels", "block_out_channels") if hasattr(config, name)),
        getattr(config, "base_dim", 128),
    )
    values = VIDEO_PIXEL_VALUES if hasattr(config, "temperal_downsample") else PIXEL_VALUES
    sides = [min(side, 512) if rendering.tile_vae else side for side in (rendering.height, rendering.width)]
    at_once = 1 if rendering.slice_vae else rows
    return int(at_once * math.prod(sides) * channels * values * torch_dtype(rendering.placement).itemsize)


def encode_bytes(tower: Any, images: int, itemsize: int) -> int:
    """Bytes of embedding images: images * tokens * width * 17 b; counted on the meta device: 12.1 (SigLIP) to 16.6 (CLIP).

    DINOv2 gets images of 224 pixels, not of the 518 that its position embeddings were trained with.
    """
    config = getattr(tower, "config", None)
    config = getattr(config, "vision_config", config)
    if config is None or not hasattr(config, "patch_size"):  # open_clip: a table of positions
        tokens, width = tower.positional_embedding.shape if hasattr(tower, "positional_embedding") else (0, 0)
    else:
        side = 224 if config.model_type == "dinov2" else config.image_size
        tokens, width = (side // config.patch_size) ** 2 + 1, config.hidden_size
    return images * tokens * width * TOWER_VALUES * itemsize


def vision_bytes(model: Any, pixels: int, trained: bool, recompute: bool) -> int:
    """Bytes of the captioner's image tower over images of ``pixels`` pixels in all.

    Without gradient 17 values per patch and width, as `encode_bytes`. If it trains, (8 D + 4 F) b per patch and layer
    stay until the backward pass (residual, norms, attention and MLP), or D b where layers are computed again.
    """
    config = getattr(model.config, "vision_config", None)
    if config is None:
        return 0
    depth = getattr(config, "depth", None) or config.num_hidden_layers
    width, inside, size = (
        config.hidden_size,
        getattr(config, "intermediate_size", 4 * config.hidden_size),
        _patch(config),
    )
    once = TOWER_VALUES * width
    values = once if not trained else once + depth * width if recompute else depth * (8 * width + 4 * inside)
    return pixels // size**2 * values * model.dtype.itemsize


def image_tokens(model: Any, pixels: int) -> int:
    """Number of prompt tokens of one image of ``pixels`` pixels; 0 if the configuration does not say."""
    config = getattr(model.config, "vision_config", None)
    fixed = getattr(model.config, "image_seq_length", None)
    if config is None or fixed:
        return fixed or 0
    return pixels // (_patch(config) * getattr(config, "spatial_merge_size", 1)) ** 2


def feature_bytes(model: Any, images: int, pixels: int) -> int:
    """Bytes of what a frozen image tower saw in images of ``pixels`` pixels each, see `uae.models.captioners.features`.

    One vector per token of an image, and one more for each of the first text layers that get some (the deepstack of Qwen3-VL).
    """
    levels = 1 + len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", ()))
    return images * image_tokens(model, pixels) * text_config(model).hidden_size * levels * model.dtype.itemsize


def _patch(vision: Any) -> int:
    size = vision.patch_size
    return size if isinstance(size, int) else size[0]
