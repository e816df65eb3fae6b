"""X-Omni's image tokenizer: a SigLIP2 image transformer, and a codebook of its features. One token covers 16 x 16 pixels.

It is used in both directions. Reading: pixels, features of the transformer, nearest code of each. Drawing: codes, and from them
features again, which the pixel decoder is given (`uae.models.tokens.x_omni_decoder`). Modules have the names of the released files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uae.weights.state import load_into, read_state

HEADS = 16  # of both SigLIP transformers that the official code knows


@dataclass(frozen=True)
class Resizing:
    """How an image is scaled before it is read; ``vision_config.transform`` of a checkpoint. Lengths are in pixels.

    Args:
        short_size: Images whose shorter side is below this are enlarged to it.
        long_size: Images whose longer side is then above this are made smaller.
        patch_size: Both sides become the nearest multiple of this.
        random_ratio: Range of a random change of the aspect ratio. That is for pretraining; only None is allowed.
        min_short_size, max_aspect_ratio: Limits on the images that are read.
        filtering: Whether the two limits apply.
    """

    short_size: int = 384
    long_size: int = 1152
    patch_size: int = 16
    random_ratio: None = None
    min_short_size: int = 128
    max_aspect_ratio: float = 3.0
    filtering: bool = True

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image after it was scaled.

        Raises:
            ValueError: The image is too small or too narrow to be read.
        """
        short, long = min(width, height), max(width, height)
        if self.filtering and (short < self.min_short_size or long / short > self.max_aspect_ratio):
            raise ValueError(
                f"an image of {width} x {height} pixels; X-Omni reads images whose shorter side has {self.min_short_size} pixels or "
                f"more and whose longer side is at most {self.max_aspect_ratio:g} times as long; change data.init_args.image_size"
            )
        sides: tuple[float, float] = (width, height)
        if min(sides) < self.short_size:
            sides = sides[0] * (self.short_size / short), sides[1] * (self.short_size / short)
        if (longest := max(sides)) > self.long_size:
            sides = sides[0] * (self.long_size / longest), sides[1] * (self.long_size / longest)
        first, second = (round(side / self.patch_size) * self.patch_size for side in sides)
        return first, second

    def pixels(self, image_CHW: Tensor) -> Tensor:
        """An image ``[3, H, W]`` in [0, 1], of any size, as what the image transformer reads: scaled, in [-1, 1], float32."""
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor, to_pil_image

        picture = to_pil_image((image_CHW.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        scaled = picture.resize(self.size(*picture.size), resample=Image.Resampling.BICUBIC)
        return (pil_to_tensor(scaled).float() / 255 - 0.5) / 0.5


class ImageTokenizer(nn.Module):
    """Images to codes, and codes to features.

    Args:
        sizes: What `sizes_of` finds in the weights.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.vit = _ImageTransformer(sizes)
        self.vqproj = _Projector(sizes)

    def encode(self, pixels_N3HW: Tensor) -> Tensor:
        """Codes ``[N, H / 16, W / 16]`` of images in [-1, 1] whose sides are multiples of 16."""
        pixels_N3HW = pixels_N3HW.to(self.vit.pos_embed.device, self.vit.pos_embed.dtype)
        codes_NHW: Tensor = self.vqproj.codes(self.vit(pixels_N3HW))
        return codes_NHW

    def decode(self, codes_NHW: Tensor) -> Tensor:
        """Features ``[N, H * W, Z]`` of codes, row after row."""
        features_NHWZ: Tensor = self.vqproj.features(codes_NHW)
        return features_NHWZ.flatten(1, 2)


@dataclass(frozen=True)
class Sizes:
    """Sizes of an image tokenizer.

    Args:
        width: Width of the image transformer and of the features.
        layers: Number of its layers.
        inner: Width inside its feed-forward parts.
        positions: Number of positions of a square image that have an embedding.
        codes: Number of codes.
        code_width: Width of a code.
        blocks: Number of residual blocks behind the codes.
    """

    width: int = 1536
    layers: int = 40
    inner: int = 6144
    positions: int = 16384
    codes: int = 16384
    code_width: int = 2048
    blocks: int = 2


def sizes_of(transformer: Mapping[str, Tensor], projector: Mapping[str, Tensor]) -> Sizes:
    """The sizes of an image tokenizer, from the shapes of its weights."""
    numbers = [int(name.split(".")[1]) for name in transformer if name.startswith("blocks.")]
    blocks = [int(name.split(".")[1]) for name in projector if name.startswith("post_conv.")]
    codes, code_width = projector["quantize.embedding.weight"].shape
    inner, width = transformer["blocks.0.mlp.fc1.weight"].shape
    positions = transformer["pos_embed"].shape[1]
    return Sizes(width, 1 + max(numbers), inner, positions, codes, code_width, 1 + max(blocks, default=-1))


def load_image_tokenizer(folder: Path, encoder: Mapping[str, Any], dtype: torch.dtype, key: str) -> ImageTokenizer:
    """The image tokenizer of a checkpoint, in eval mode and without gradients. No code in its files is run.

    The file of the transformer may hold more than is used (its last norm, its pooling head).

    Args:
        folder: Folder of the checkpoint.
        encoder: ``vision_config.encoder`` of its ``config.json``, which names the two files.
        dtype: Dtype of the weights. Codes depend on it, because similarities are rounded.
        key: The setting that holds the name of the folder, for error messages.

    Raises:
        FileNotFoundError, ValueError: A file is missing, or does not hold the weights.
    """
    transformer, projector = (read_state(folder / encoder[name]) for name in ("siglip_path", "projector_path"))
    with torch.device("meta"):
        tokenizer = ImageTokenizer(sizes_of(transformer, projector)).to(dtype)
    used = tokenizer.vit.state_dict().keys()
    transformer = {name: value for name, value in transformer.items() if name in used}
    load_into(tokenizer.vit, transformer, str(folder / encoder["siglip_path"]), key)
    load_into(tokenizer.vqproj, projector, str(folder / encoder["projector_path"]), key)
    return tokenizer.requires_grad_(False).eval()


class _ImageTransformer(nn.Module):
    """SigLIP's image transformer without its last norm and its pooling, for images of any size."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, sizes.width, 16, stride=16)})
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.positions, sizes.width))
        self.blocks = nn.ModuleList([_Block(sizes) for _ in range(sizes.layers)])

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Features ``[N, Z, H / 16, W / 16]``."""
        patches_NZHW = self.patch_embed["proj"](pixels_N3HW)
        height, width = patches_NZHW.shape[2:]
        states_NPZ = patches_NZHW.flatten(2).transpose(1, 2) + self._positions(height, width)
        for block in self.blocks:
            states_NPZ = block(states_NPZ)
        return states_NPZ.transpose(1, 2).unflatten(2, (height, width))

    def _positions(self, height: int, width: int) -> Tensor:
        """Position embeddings ``[1, P, Z]`` of an image, interpolated from those of a square one."""
        side = math.isqrt(self.pos_embed.shape[1])
        if (height, width) == (side, side):
            return self.pos_embed
        square_1ZSS = self.pos_embed.transpose(1, 2).unflatten(2, (side, side))
        scaled_1ZHW = F.interpolate(square_1ZSS, (height, width), mode="bilinear", align_corners=False)
        return scaled_1ZHW.flatten(2).transpose(1, 2)


class _Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(sizes.width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(sizes.width, 3 * sizes.width), "proj": nn.Linear(sizes.width, sizes.width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(sizes.width, sizes.inner), "fc2": nn.Linear(sizes.inner, sizes.width)})

    def forward(self, states_NPZ: Tensor) -> Tensor:
        states_NPZ = states_NPZ + self._attend(self.norm1(states_NPZ))
        return states_NPZ + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(states_NPZ))))

    def _attend(self, states_NPZ: Tensor) -> Tensor:
        query, key, value = self.attn["qkv"](states_NPZ).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed_NPZ = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out_NPZ: Tensor = self.attn["proj"](mixed_NPZ)
        return out_NPZ


class _Projector(nn.Module):
    """From features to codes and back. Codes are compared in direction only, but their stored length counts on the way back."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.quant_conv = nn.Conv2d(sizes.width, sizes.code_width, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(sizes.codes, sizes.code_width)})
        self.post_quant_conv = nn.Conv2d(sizes.code_width, sizes.width, 1)
        self.post_conv = nn.Sequential(*[_Residual(sizes.width) for _ in range(sizes.blocks)])

    def codes(self, features_NZHW: Tensor) -> Tensor:
        """The nearest code ``[N, H, W]`` of each feature.

        The distance is a sum of three terms, as in the official code: in 16 bits its rounding decides between near codes.
        """
        states_NHWC = F.normalize(self.quant_conv(features_NZHW).permute(0, 2, 3, 1), dim=-1)
        table: Any = self.quantize["embedding"]
        codes_VC = F.normalize(table.weight, dim=-1)
        states_RC = states_NHWC.reshape(-1, codes_VC.shape[1])
        distance_RV = (states_RC**2).sum(1, keepdim=True) + (codes_VC**2).sum(1) - 2 * states_RC @ codes_VC.T
        return distance_RV.argmin(1).view(states_NHWC.shape[:3])

    def features(self, codes_NHW: Tensor) -> Tensor:
        """Features ``[N, H, W, Z]`` of codes."""
        states_NCHW = self.quantize["embedding"](codes_NHW).permute(0, 3, 1, 2)
        features_NZHW: Tensor = self.post_conv(self.post_quant_conv(states_NCHW))
        return features_NZHW.permute(0, 2, 3, 1)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = (nn.GroupNorm(32, width) for _ in range(2))

    def forward(self, features_NZHW: Tensor) -> Tensor:
        inner_NZHW = self.conv1(F.gelu(self.norm1(features_NZHW)))
        return features_NZHW + self.conv2(F.gelu(self.norm2(inner_NZHW)))
