"""Tiny BAGEL with random weights, in the official layout: every name of both weight files, and the two configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uae.rehearsal.language_models import QWEN, WIDTH, tokenizer

HEADS, GROUPS, INSIDE, LAYERS = 4, 2, 128, 2
VISION = {  # the last layer is in the file, and is not used
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "num_channels": 3,
    "patch_size": 14, "image_size": 980, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0,
    "model_type": "siglip_vision_model",
}  # fmt: skip
CHANNELS, BLOCKS, LATENT, PATCH, SIDE = [32, 32, 32, 32], 1, 4, 2, 64

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, width: int, out: int, bias: bool = True) -> Shapes:
    """The weights of a linear layer."""
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _layer(name: str, end: str) -> Shapes:
    """One of the two sets of weights of a layer of the language model."""
    size, attention, mlp = WIDTH // HEADS, f"{name}.self_attn", f"{name}.mlp{end}"
    found: Shapes = {f"{name}.{norm}_layernorm{end}.weight": (WIDTH,) for norm in ("input", "post_attention")}
    for part, out in (("q", HEADS * size), ("k", GROUPS * size), ("v", GROUPS * size)):
        found |= linear(f"{attention}.{part}_proj{end}", WIDTH, out)
    found |= linear(f"{attention}.o_proj{end}", HEADS * size, WIDTH, bias=False)
    found |= {f"{attention}.{part}_norm{end}.weight": (size,) for part in "qk"}
    found |= linear(f"{mlp}.gate_proj", WIDTH, INSIDE, bias=False) | linear(f"{mlp}.up_proj", WIDTH, INSIDE, bias=False)
    return found | linear(f"{mlp}.down_proj", INSIDE, WIDTH, bias=False)


def _vision_layer(name: str) -> Shapes:
    width: Any = VISION["hidden_size"]
    inside: Any = VISION["intermediate_size"]
    found = _norm(f"{name}.layer_norm1", width) | _norm(f"{name}.layer_norm2", width)
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        found |= linear(f"{name}.self_attn.{part}", width, width)
    return found | linear(f"{name}.mlp.fc1", width, inside) | linear(f"{name}.mlp.fc2", inside, width)


def network(vocabulary: int) -> Shapes:
    """The names and shapes of ``ema.safetensors``."""
    text, vision, width = "language_model.model", "vit_model.vision_model", 32
    found: Shapes = {f"{text}.embed_tokens.weight": (vocabulary, WIDTH), "language_model.lm_head.weight": (vocabulary, WIDTH)}
    for end in ("", "_moe_gen"):
        found[f"{text}.norm{end}.weight"] = (WIDTH,)
        for number in range(LAYERS):
            found |= _layer(f"{text}.layers.{number}", end)
    found |= linear(f"{vision}.embeddings.patch_embedding", 3 * 14**2, width)
    found[f"{vision}.embeddings.position_embedding.weight"] = (70**2, width)
    for number in range(3):
        found |= _vision_layer(f"{vision}.encoder.layers.{number}")
    found |= _norm(f"{vision}.post_layernorm", width)
    found |= linear("connector.fc1", width, WIDTH) | linear("connector.fc2", WIDTH, WIDTH)
    found |= {"vit_pos_embed.pos_embed": (70**2, WIDTH), "latent_pos_embed.pos_embed": (SIDE**2, WIDTH)}
    found |= linear("time_embedder.mlp.0", 256, WIDTH) | linear("time_embedder.mlp.2", WIDTH, WIDTH)
    latent = LATENT * PATCH**2
    return found | linear("vae2llm", latent, WIDTH) | linear("llm2vae", WIDTH, latent)


def _convolution(name: str, width: int, out: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (out, width, side, side), f"{name}.bias": (out,)}


def _residual(name: str, width: int, out: int) -> Shapes:
    found = _norm(f"{name}.norm1", width) | _convolution(f"{name}.conv1", width, out)
    found |= _norm(f"{name}.norm2", out) | _convolution(f"{name}.conv2", out, out)
    return found | (_convolution(f"{name}.nin_shortcut", width, out, 1) if width != out else {})


def _middle(name: str, width: int) -> Shapes:
    found = _residual(f"{name}.block_1", width, width) | _residual(f"{name}.block_2", width, width)
    for part in ("q", "k", "v", "proj_out"):
        found |= _convolution(f"{name}.attn_1.{part}", width, width, 1)
    return found | _norm(f"{name}.attn_1.norm", width)


def autoencoder() -> Shapes:
    """The names and shapes of ``ae.safetensors``, which are those of the original FLUX."""
    first, last, levels = CHANNELS[0], CHANNELS[-1], len(CHANNELS)
    found = _convolution("encoder.conv_in", 3, first) | _convolution("decoder.conv_in", LATENT, last)
    wide = first
    for level, out in enumerate(CHANNELS):
        for block in range(BLOCKS):
            found |= _residual(f"encoder.down.{level}.block.{block}", wide if block == 0 else out, out)
        found |= _convolution(f"encoder.down.{level}.downsample.conv", out, out) if level < levels - 1 else {}
        wide = out
    wide = last
    for level, out in reversed(list(enumerate(CHANNELS))):
        for block in range(BLOCKS + 1):
            found |= _residual(f"decoder.up.{level}.block.{block}", wide if block == 0 else out, out)
        found |= _convolution(f"decoder.up.{level}.upsample.conv", out, out) if level > 0 else {}
        wide = out
    found |= _middle("encoder.mid", last) | _middle("decoder.mid", last)
    found |= _norm("encoder.norm_out", last) | _convolution("encoder.conv_out", last, 2 * LATENT)
    return found | _norm("decoder.norm_out", first) | _convolution("decoder.conv_out", first, 3)


def drawn_weights(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Weights at which text, images and times all matter; both sets of a layer differ, and no layer is zero."""
    noise = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        embedding = "embed" in name.rsplit(".", 2)[-2] and len(shape) == 2 or "lm_head" in name or name.endswith("pos_embed")
        fan = torch.Size(shape[1:]).numel()
        if len(shape) > 1:
            scale = 0.2 if embedding and "patch" not in name else 1.2 * fan**-0.5
            state[name] = scale * torch.randn(shape, generator=noise)
        else:
            spread = 0.1 * torch.randn(shape, generator=noise)
            state[name] = 1 + spread if name.endswith("weight") else spread
    return state


def write_bagel(folder: Path) -> None:
    """All files of a checkpoint that are read."""
    from safetensors.torch import save_file

    reader = tokenizer(QWEN)
    vocabulary = len(reader) + 8  # as released, there are more rows than tokens
    llm = {
        "model_type": "qwen2", "hidden_size": WIDTH, "intermediate_size": INSIDE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "vocab_size": vocabulary, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_position_embeddings": 32768, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "llm_config.json").write_text(json.dumps(llm, indent=1))
    (folder / "vit_config.json").write_text(json.dumps(VISION, indent=1))
    (folder / "config.json").write_text(json.dumps({"model_type": "bagel"}))
    state = drawn_weights(network(vocabulary), seed=21)
    _speak(state, reader)
    save_file({name: value.bfloat16() for name, value in state.items()}, folder / "ema.safetensors")
    save_file(drawn_weights(autoencoder(), seed=22), folder / "ae.safetensors")
    reader.save_pretrained(folder)


def _speak(state: dict[str, Tensor], reader: Any) -> None:
    """Captions that end now and then: a constant feature, which no layer touches, is a bias in the output head."""
    for end in ("", "_moe_gen"):
        for number in range(LAYERS):
            layer = f"language_model.model.layers.{number}"
            state[f"{layer}.self_attn.o_proj{end}.weight"][0] = 0
            state[f"{layer}.mlp{end}.down_proj.weight"][0] = 0
    state["language_model.model.norm.weight"][0] = 8
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        state[name][:, 0] = 1.0
        state[name][reader.eos_token_id] *= 0.3
        state[name][reader.eos_token_id, 0] = 1.25


BAGEL: dict[str, Callable[[Path], None]] = {"ByteDance-Seed/BAGEL-7B-MoT": write_bagel}
