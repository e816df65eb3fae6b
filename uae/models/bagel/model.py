"""BAGEL as one module: language model, image tower, and what leads from patches and latents to its tokens and back."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uae.models.bagel.decoder import Decoder, LanguageModel
from uae.models.bagel.pixels import places
from uae.models.bagel.vision import ImageTower
from uae.weights.state import save_state

WEIGHTS, AUTOENCODER, CONFIGS = "ema.safetensors", "ae.safetensors", ("llm_config.json", "vit_config.json")
WAVES = 256  # numbers that a time is written with, half of them cosines


@dataclass(frozen=True)
class Config:
    """Sizes of BAGEL.

    Args:
        text_config: A ``Qwen2Config``, of ``llm_config.json``.
        vision_config: A ``SiglipVisionConfig``, of ``vit_config.json``, with the number of layers that are built.
        latent_channels: Channels of the autoencoder's latents.
        latent_patch: Side of the square of latent pixels that is one token.
        latent_side: Side of the table of positions of latent tokens.
    """

    text_config: Any
    vision_config: Any
    latent_channels: int = 16
    latent_patch: int = 2
    latent_side: int = 64

    def get_text_config(self, decoder: bool = False) -> Any:
        """The configuration of the language model, as a configuration of transformers gives it."""
        return self.text_config

    def to_dict(self) -> dict[str, Any]:
        """What PEFT wants to know of a model."""
        return {"model_type": "bagel", "tie_word_embeddings": False}

    @property
    def latent_width(self) -> int:
        """How many numbers of the latents are one token."""
        return self.latent_channels * self.latent_patch**2


class Connector(nn.Module):
    """Features of the image tower to tokens of the language model."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, x_LD: Tensor) -> Tensor:
        """``[L, width]`` to ``[L, out]``."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x_LD), approximate="tanh"))
        return out


class PositionTable(nn.Module):
    """A table of positions that never trains: a buffer, which finetuning and optimizers cannot find."""

    pos_embed: Tensor

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.register_buffer("pos_embed", torch.zeros(side**2, width))


class TimeEmbedder(nn.Module):
    """A time in [0, 1] to a vector: cosines, then sines, of `WAVES` / 2 wavelengths up to 10000 times 2 pi, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_N: Tensor) -> Tensor:
        """``[N]`` to ``[N, width]``."""
        half = WAVES // 2
        rate = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t_N.device))
        angle = t_N.float()[:, None] * rate
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        out: Tensor = self.mlp(waves.to(next(self.mlp.parameters()).dtype))
        return out


class Bagel(nn.Module):
    """The network with the names of ``ema.safetensors``. The autoencoder is not part of it.

    Args:
        config: Its sizes.
        folder: Folder that the weights came from; what is exported later needs its autoencoder.
    """

    def __init__(self, config: Config, folder: str = "") -> None:
        super().__init__()
        width, latent, vision = config.text_config.hidden_size, config.latent_width, config.vision_config
        self.config, self.name_or_path = config, folder
        self.language_model = LanguageModel(config.text_config)
        self.vit_model = ImageTower(vision)
        self.connector = Connector(vision.hidden_size, width)
        self.vit_pos_embed = PositionTable(vision.image_size // vision.patch_size, width)
        self.latent_pos_embed = PositionTable(config.latent_side, width)
        self.time_embedder = TimeEmbedder(width)
        self.vae2llm, self.llm2vae = nn.Linear(latent, width), nn.Linear(width, latent)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.language_model.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.language_model.lm_head.weight.device

    def get_decoder(self) -> Decoder:
        """The language model without its head."""
        return self.language_model.model

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of token embeddings."""
        return self.language_model.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The output head."""
        return self.language_model.lm_head

    def features(self, patches_LP: Tensor, rows: int, columns: int) -> Tensor:
        """What the image tower sees in one image, ``[rows * columns, width of the tower]``."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        found: Tensor = self.vit_model(patches_LP, places(rows, columns, side, patches_LP.device))
        return found

    def image_tokens(self, features_LD: Tensor, rows: int, columns: int) -> Tensor:
        """The tokens ``[rows * columns, D]`` of an image that is read, from its features."""
        vision, table = self.config.vision_config, self.vit_pos_embed.pos_embed
        at = places(rows, columns, vision.image_size // vision.patch_size, features_LD.device)
        return self.connector(features_LD) + table[at].to(features_LD.dtype)

    def latent_tokens(self, x_NLP: Tensor, t_N: Tensor, rows: int) -> Tensor:
        """The tokens ``[N, L, D]`` of latents ``[N, L, P]`` at times ``[N]`` from 1 (noise) to 0 (image)."""
        at = places(rows, x_NLP.shape[1] // rows, self.config.latent_side, x_NLP.device)
        x_NLD = self.vae2llm(x_NLP.to(self.vae2llm.weight.dtype)) + self.time_embedder(t_N)[:, None]
        return x_NLD + self.latent_pos_embed.pos_embed[at].to(x_NLD.dtype)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write a checkpoint in the official layout, with autoencoder and configurations of the folder that this one came from."""
        weights = self.state_dict() if state_dict is None else state_dict
        save_state(folder, WEIGHTS.removesuffix(".safetensors"), weights)
        for name in (AUTOENCODER, *CONFIGS):
            shutil.copyfile(Path(self.name_or_path, name), Path(folder, name))


def without_weights(config: Config, dtype: torch.dtype, folder: str = "") -> Bagel:
    """A network on the meta device, in eval mode."""
    with torch.device("meta"):
        return Bagel(copy.deepcopy(config), folder).to(dtype).eval()
