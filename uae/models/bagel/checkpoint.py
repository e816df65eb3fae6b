"""BAGEL's checkpoint folder: ``llm_config.json``, ``vit_config.json``, ``ema.safetensors``, ``ae.safetensors`` and a tokenizer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uae.models.bagel.model import AUTOENCODER, CONFIGS, WEIGHTS, Bagel, Config, without_weights
from uae.weights.from_state import diffusion_model
from uae.weights.state import load_into, read_state

KEY = "model.init_args.system.init_args.checkpoint"
AUTOENCODER_CONFIG: dict[str, Any] = {  # of the released one, which is FLUX's
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip


def config_from(llm: Mapping[str, Any], vit: Mapping[str, Any], **sizes: int) -> Config:
    """The configuration that the official code makes of two files.

    The last layer of the image tower is left out, and queries and keys are normed, whatever the files say.

    Args:
        llm: Content of ``llm_config.json``.
        vit: Content of ``vit_config.json``.
        sizes: Other sizes than the released ones, see `Config`.
    """
    from transformers import Qwen2Config, SiglipVisionConfig

    text = Qwen2Config.from_dict({**llm, "tie_word_embeddings": False})
    vision = SiglipVisionConfig.from_dict({**vit, "num_hidden_layers": vit["num_hidden_layers"] - 1})
    return Config(text, vision, **sizes)


def config_in(folder: Path) -> Config:
    """The configuration of the checkpoint in a folder.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The weights are not those of a BAGEL that draws.
    """
    for name in (*CONFIGS, WEIGHTS, AUTOENCODER):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {str(folder)!r}; allowed: a folder in the official layout, as ByteDance-Seed/BAGEL-7B-MoT; change {KEY}"
            )
    llm, vit = (json.loads((folder / name).read_text()) for name in CONFIGS)
    return config_from(llm, vit, **_sizes(folder, read_state(folder / WEIGHTS)))


def load(folder: Path, dtype: torch.dtype) -> Bagel:
    """The network in a folder, on the CPU.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The weights do not fit the configuration.
    """
    model = without_weights(config_in(folder), dtype, str(folder))
    state = weights_in(folder, model.config.vision_config.num_hidden_layers)
    load_into(model, state, str(folder / WEIGHTS), KEY)
    return model


def weights_in(folder: Path, layers: int) -> dict[str, Tensor]:
    """The weights of a folder, without the layers of the image tower from number ``layers`` on, which are not used."""
    state = read_state(folder / WEIGHTS)
    layer = re.compile(r"vit_model\.vision_model\.encoder\.layers\.(\d+)\.")
    numbers = {name: int(match[1]) for name in state if (match := layer.match(name))}
    return {name: value for name, value in state.items() if numbers.get(name, -1) < layers}


def _sizes(folder: Path, state: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes that no file says, from the shapes of weights."""
    table, read = state.get("latent_pos_embed.pos_embed"), state.get("vae2llm.weight")
    if table is None or read is None:
        missing = "latent_pos_embed.pos_embed" if table is None else "vae2llm.weight"
        raise ValueError(f"{str(folder / WEIGHTS)!r} has no {missing}: no BAGEL that draws images; correct {KEY}")
    channels = autoencoder_config(read_state(folder / AUTOENCODER))["latent_channels"]
    return {
        "latent_channels": channels,
        "latent_patch": math.isqrt(read.shape[1] // channels),
        "latent_side": math.isqrt(len(table)),
    }


def autoencoder_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of an autoencoder, in diffusers' words, from the shapes of its weights in ``ae.safetensors``."""
    name = "encoder.down.{}.block.{}.conv1.weight"
    levels = next(n for n in range(len(state)) if name.format(n, 0) not in state)
    blocks = next(n for n in range(len(state)) if name.format(0, n) not in state)
    return AUTOENCODER_CONFIG | {
        "block_out_channels": [state[name.format(level, 0)].shape[0] for level in range(levels)],
        "layers_per_block": blocks,
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def load_autoencoder(folder: Path, dtype: torch.dtype) -> Any:
    """The ``AutoencoderKL`` in a folder, frozen, on the CPU."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = read_state(folder / AUTOENCODER)
    config = autoencoder_config(state)
    named = convert_ldm_vae_checkpoint(dict(state), config)
    return diffusion_model(AutoencoderKL, config, named, dtype, str(folder / AUTOENCODER), KEY).requires_grad_(False)


def autoencoder_without_weights(folder: Path | None) -> Any:
    """The autoencoder of a folder on the meta device; without a folder, the released one."""
    from diffusers import AutoencoderKL

    config = AUTOENCODER_CONFIG if folder is None else autoencoder_config(read_state(folder / AUTOENCODER))
    with torch.device("meta"):
        return AutoencoderKL.from_config(config)
