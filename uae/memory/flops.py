"""Floating-point operations of a run's networks, counted by torch on the meta device, where nothing is computed.

A product of matrices of m x k and k x n counts 2 m k n; everything else, normalisation and activation functions, counts nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from uae.memory import estimates
from uae.memory.counting import embeds, text_config
from uae.models.captioners.caches import cache_argument, library_cache, prompt_cache, recomputing, select
from uae.models.captioners.policy import CaptionPolicy
from uae.models.merged import merged
from uae.models.renderers.rendering import Rendering

# Widths of a condition, in configurations of denoisers.
WIDTHS = ("joint_attention_dim", "caption_channels", "cross_attention_dim", "text_feat_dim")


def counted(function: Callable[[], Any]) -> int:
    """Operations of what a function computes with networks on the meta device."""
    with FlopCounterMode(display=False) as counter, _Valueless():
        function()
    return int(counter.get_total_flops())


class _Valueless(TorchFunctionMode):
    """Takes every tensor for one without values, and every condition on such a tensor for false."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        meta = {tensor.is_meta for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        if function is Tensor.__bool__ and meta == {True}:
            return False
        if len(meta) == 2:
            args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
        return function(*args, **kwargs)


def caption_flop(policy: CaptionPolicy, prompt: int, tokens: int, group: int, learns: bool = False) -> int:
    """Log-probs of the captions of one image: the prompt once, then all captions, then the output head.

    Args:
        policy: The captioner's network on the meta device.
        prompt: P, number of tokens of the prompt.
        tokens: T, number of tokens of a caption.
        group: G, number of captions.
        learns: Whether the backward pass counts, too, with what it computes again under gradient checkpointing.
    """
    decoder, recompute = policy.base.get_decoder(), learns and policy.gradient_checkpointing

    def run() -> None:
        with torch.set_grad_enabled(learns), recomputing(policy.model) if recompute else nullcontext():
            cache = prompt_cache(policy.base) if recompute else library_cache(policy.base)
            read = decoder(**embeds(policy, 1, prompt), **cache_argument(decoder, cache), use_cache=True).last_hidden_state
            states = [read[:, -1:].expand(group, 1, -1).flatten()]
            if tokens > 1:
                sees = torch.empty(1, 1, tokens - 1, prompt + tokens - 1, dtype=torch.bool, device="meta")
                longer, one = embeds(policy, group, tokens - 1) | {"attention_mask": sees}, torch.zeros(group, dtype=torch.long)
                spoken = decoder(**longer, **cache_argument(decoder, select(cache, one)), use_cache=True)
                states.append(spoken.last_hidden_state.flatten())
        if learns:
            torch.cat(states).sum().backward()

    return _without_gradients(policy, run) + group * tokens * head_flop(policy, learns)


def pass_flop(policy: CaptionPolicy, length: int, learns: bool = False) -> int:
    """One row through the language model, without its output head."""
    recompute = learns and policy.gradient_checkpointing

    def run() -> None:
        with torch.set_grad_enabled(learns), recomputing(policy.model) if recompute else nullcontext():
            states = policy.base.get_decoder()(**embeds(policy, 1, length), use_cache=False).last_hidden_state
        if learns:
            states.sum().backward()

    return _without_gradients(policy, run)


def steps_flop(policy: CaptionPolicy, prompt: int, steps: int) -> float:
    """One row through the language model, token by token behind a prompt, without the output head.

    A step takes as many more operations as its cache is longer, so the first and the last one say how many all of them take.
    """
    if steps < 1:
        return 0.0
    decoder = policy.base.get_decoder()

    def step(length: int) -> int:
        cache = library_cache(policy.base)
        arguments = cache_argument(decoder, cache)
        with _Valueless():
            decoder(**embeds(policy, 1, length), **arguments, use_cache=True)
        return counted(lambda: decoder(**embeds(policy, 1, 1), **arguments, use_cache=True))

    with torch.no_grad(), merged(policy.model):
        return steps * (step(prompt) + step(prompt + steps - 1)) / 2


def merging_flop(policy: CaptionPolicy) -> int:
    """The sums of weights and adapter that sampling makes once per rollout, see `uae.models.merged`."""

    def run() -> None:
        with merged(policy.model):
            pass

    return counted(run)


def head_flop(policy: CaptionPolicy, learns: bool = False) -> int:
    """The output head for one token, by the products in `uae.grpo.logprobs`, whose autocast torch has not on the meta device.

    A head that is frozen gives the gradient of its input with one product more. One that trains computes its logits twice.
    """
    config, trained = text_config(policy.base), policy.base.get_output_embeddings().weight.requires_grad
    products = 1 if not learns else 4 if trained else 2
    return products * 2 * config.vocab_size * config.hidden_size


def tower_flop(policy: CaptionPolicy, pixels: int, learns: bool = False) -> int:
    """The image tower for one image; 0 if there is none, as where images are read as tokens of a codebook."""
    vision = getattr(policy.base.config, "vision_config", None)
    if vision is None:
        return 0
    dtype, arguments = policy.base.dtype, dict[str, Tensor]()
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    if hasattr(vision, "spatial_merge_size"):  # images of any size, as rows of patches
        unit = patch * vision.spatial_merge_size
        patches = max(1, round(math.sqrt(pixels) / unit)) * vision.spatial_merge_size
        values = getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1) * patch**2
        shape: tuple[int, ...] = (patches**2, values)
        arguments["image_grid_thw"] = torch.tensor([[1, patches, patches]])
    else:
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        shape = (1, 3, side, side)
    recompute = learns and policy.gradient_checkpointing

    def run() -> None:
        images = torch.empty(shape, dtype=dtype, device="meta")
        with torch.set_grad_enabled(learns), recomputing(policy.model) if recompute else nullcontext():
            seen = policy.base.model.get_image_features(images, **arguments).pooler_output
        if learns:
            parts = [seen] if isinstance(seen, Tensor) else list(seen)
            torch.cat(parts).sum().backward()

    return _without_gradients(policy, run)


def _without_gradients(policy: CaptionPolicy, run: Callable[[], None]) -> int:
    """Operations of a pass whose gradients nobody needs."""
    try:
        return counted(run)
    finally:
        policy.zero_grad()


@torch.no_grad()
def encoder_flop(tower: Any) -> int:
    """An image encoder for one image, at the size that it is given."""
    config = getattr(tower, "config", None)
    config = getattr(config, "vision_config", config)
    if config is None:  # open_clip
        side = tower.image_size if isinstance(tower.image_size, int) else tower.image_size[0]
    else:
        side = 224 if config.model_type == "dinov2" else config.image_size
    dtype = next(tower.parameters()).dtype
    return counted(lambda: getattr(tower, "vision_model", tower)(torch.empty(1, 3, side, side, dtype=dtype, device="meta")))


@torch.no_grad()
def reader_flop(network: nn.Module, tokens: int) -> int:
    """A frozen network of the conditioner for one caption; 2 per parameter and token if it reads no token ids."""
    kind = getattr(network, "main_input_name", None)  # of models of transformers
    if kind == "pixel_values":
        return encoder_flop(network)
    if kind is None:
        return 2 * tokens * sum(weight.numel() for weight in network.parameters() if weight.ndim > 1)
    text: Any = network
    length = min(tokens, getattr(text.config, "max_position_embeddings", tokens))
    return counted(lambda: text(input_ids=torch.empty(1, length, dtype=torch.long, device="meta")))


@torch.no_grad()
def denoiser_flop(denoiser: Any, vae: Any, rendering: Rendering, tokens: int) -> int:
    """One pass of a denoiser over one image.

    Args:
        denoiser: Diffusion transformer or U-Net of diffusers.
        vae: Its autoencoder, which determines the size of latents.
        rendering: Size of the images.
        tokens: L, number of tokens of the condition.

    Raises:
        TypeError: It takes arguments that are not known here.
    """
    config, takes = denoiser.config, inspect.signature(type(denoiser).forward).parameters
    h, w = (math.ceil(side / estimates.downsampling(vae.config)) for side in (rendering.height, rendering.width))
    channels = getattr(vae.config, "latent_channels", None) or getattr(vae.config, "z_dim", None) or config.in_channels
    width = next((getattr(config, name) for name in WIDTHS if getattr(config, name, None)), 0)

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=denoiser.dtype, device="meta")

    packed = config.in_channels // channels > 1  # 2 x 2 latent pixels are one token
    latents = empty(1, h * w // 4, config.in_channels) if packed else empty(1, config.in_channels, h, w)
    known = {
        "hidden_states": lambda: latents,
        "sample": lambda: latents,
        "encoder_hidden_states": lambda: empty(1, tokens, width),
        "timestep": lambda: empty(1),
        "pooled_projections": lambda: empty(1, config.pooled_projection_dim),
        "guidance": lambda: empty(1) if getattr(config, "guidance_embeds", False) else None,
        "img_ids": lambda: empty(h * w // 4, 3),
        "txt_ids": lambda: empty(tokens, 3),
        "img_shapes": lambda: [(1, h // 2, w // 2)],
        "encoder_hidden_states_mask": lambda: torch.empty(1, tokens, dtype=torch.bool, device="meta"),
        "added_cond_kwargs": lambda: _sizes_of_sdxl(denoiser, empty),
    }
    arguments = {name: known[name]() for name in takes if name in known}
    return counted(lambda: denoiser(**arguments))


def _sizes_of_sdxl(unet: Any, empty: Callable[..., Tensor]) -> dict[str, Tensor] | None:
    if getattr(unet.config, "addition_embed_type", None) != "text_time":
        return None
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return {"text_embeds": empty(1, pooled), "time_ids": empty(1, 6)}


@torch.no_grad()
def decoder_flop(vae: Any, rendering: Rendering) -> int:
    """An autoencoder's decoder for one image."""
    config, factor = vae.config, estimates.downsampling(vae.config)
    sides = [math.ceil(side / factor) for side in (rendering.height, rendering.width)]
    video = hasattr(config, "temperal_downsample")
    shape = (1, config.z_dim, 1, *sides) if video else (1, config.latent_channels, *sides)
    return counted(lambda: vae.decode(torch.empty(shape, dtype=vae.dtype, device="meta")))
