"""Tiny OmniGen2 with random weights, in the official layout: language model, processor, transformer, autoencoder, scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uae.rehearsal.language_models import QWEN, WIDTH, qwen2_5_vl
from uae.rehearsal.pipelines import autoencoder

DRAWS = "<|img|>"  # the token with which the released model asks to draw
HIDDEN, HEADS, GROUPS, LAYERS, REFINERS, CHANNELS, PATCH, REFERENCES = 48, 4, 2, 2, 1, 4, 2, 5
INSIDE = 240  # the next multiple of 80 after 4 times the width

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, width: int, out: int) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _layer(name: str, timed: bool = True) -> Shapes:
    size = HIDDEN // HEADS
    found: Shapes = {f"{name}.attn.to_{part}.weight": (GROUPS * size, HIDDEN) for part in "kv"}
    found |= {f"{name}.attn.{part}.weight": (HIDDEN, HIDDEN) for part in ("to_q", "to_out.0")}
    found |= {f"{name}.attn.norm_{part}.weight": (size,) for part in "qk"}
    found |= {f"{name}.feed_forward.linear_{part}.weight": (INSIDE, HIDDEN) for part in "13"}
    found[f"{name}.feed_forward.linear_2.weight"] = (HIDDEN, INSIDE)
    found |= {f"{name}.{part}.weight": (HIDDEN,) for part in ("ffn_norm1", "norm2", "ffn_norm2")}
    first: Shapes = {f"{name}.norm1.norm.weight": (HIDDEN,)} | _linear(f"{name}.norm1.linear", HIDDEN, 4 * HIDDEN)
    return found | (first if timed else {f"{name}.norm1.weight": (HIDDEN,)})


def transformer() -> Shapes:
    """The names and shapes of the transformer's weights."""
    latent, embed = CHANNELS * PATCH**2, "time_caption_embed"
    found = _linear("x_embedder", latent, HIDDEN) | _linear("ref_image_patch_embedder", latent, HIDDEN)
    found |= _linear(f"{embed}.timestep_embedder.linear_1", 256, HIDDEN)
    found |= _linear(f"{embed}.timestep_embedder.linear_2", HIDDEN, HIDDEN)
    found |= _linear(f"{embed}.caption_embedder.1", WIDTH, HIDDEN) | {f"{embed}.caption_embedder.0.weight": (WIDTH,)}
    for name in ("noise_refiner", "ref_image_refiner", "context_refiner", "layers"):
        for number in range(LAYERS if name == "layers" else REFINERS):
            found |= _layer(f"{name}.{number}", timed=name != "context_refiner")
    found |= _linear("norm_out.linear_1", HIDDEN, HIDDEN) | _linear("norm_out.linear_2", HIDDEN, latent)
    return found | {"image_index_embedding": (REFERENCES, HIDDEN)}


def drawn_weights(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Weights at which caption, latents and time all matter."""
    noise = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=noise)
        around = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0  # of norms
        state[name] = around + 0.1 * value if len(shape) == 1 else 1.2 * shape[1] ** -0.5 * value
    return state


def write_omnigen2(folder: Path) -> None:
    """All files of a checkpoint that are read."""
    from huggingface_hub import save_torch_state_dict

    model, processor = qwen2_5_vl(tied=True, seed=31, specials=[*QWEN, DRAWS])
    model.bfloat16().save_pretrained(folder / "mllm")
    processor.save_pretrained(folder / "processor")
    autoencoder(shift_factor=0.1).save_pretrained(folder / "vae")
    state = {name: value.bfloat16() for name, value in drawn_weights(transformer(), seed=32).items()}
    (folder / "transformer").mkdir()
    save_torch_state_dict(
        state, folder / "transformer", filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size="200KB"
    )
    size = HIDDEN // HEADS // 3
    network = {
        "_class_name": "OmniGen2Transformer2DModel", "patch_size": PATCH, "in_channels": CHANNELS, "out_channels": None,
        "hidden_size": HIDDEN, "num_layers": LAYERS, "num_refiner_layers": REFINERS, "num_attention_heads": HEADS,
        "num_kv_heads": GROUPS, "multiple_of": 80, "ffn_dim_multiplier": None, "norm_eps": 1e-5, "axes_dim_rope": [size] * 3,
        "axes_lens": [1024] * 3, "text_feat_dim": WIDTH, "timestep_scale": 1000.0,
    }  # fmt: skip
    _write(folder / "transformer" / "config.json", network)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "dynamic_time_shift": True}
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "OmniGen2Pipeline", "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "processor": ["transformers", "Qwen2_5_VLProcessor"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["scheduling_flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["transformer_omnigen2", "OmniGen2Transformer2DModel"],
    }  # fmt: skip
    _write(folder / "model_index.json", index)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1))


OMNIGEN2: dict[str, Callable[[Path], None]] = {"OmniGen2/OmniGen2": write_omnigen2}
