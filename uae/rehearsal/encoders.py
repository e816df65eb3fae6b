"""Tiny image encoders with random weights, in the layouts of the released ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from uae.rehearsal.tokenizers import clip_tokenizer


class Sizes(TypedDict):
    """Keyword arguments that the configurations of all transformers here share."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


class Moments(TypedDict):
    """Keyword arguments of image processors: mean and standard deviation of the three colour channels."""

    image_mean: list[float]
    image_std: list[float]


SIZES: Sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGENET: Moments = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def write_clip(folder: Path, positions: int = 77, seed: int = 0) -> None:
    """CLIP with image and text encoder. LongCLIP is CLIP with 248 text positions."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig

    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = positions
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=positions, projection_dim=24, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **SIZES,
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=24, **SIZES)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    spread(CLIPModel(config), seed).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(pixels, tokenizer).save_pretrained(folder)
    pixels.save_pretrained(folder)


def write_dinov2(folder: Path) -> None:
    """DINOv2 with 14-pixel patches."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    spread(Dinov2Model(config), seed=2).save_pretrained(folder)
    crop = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=crop, resample=3, **IMAGENET).save_pretrained(folder)


def write_dinov3(folder: Path) -> None:
    """DINOv3 with 16-pixel patches and four registers."""
    from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

    config = DINOv3ViTConfig(image_size=32, patch_size=16, num_register_tokens=4, **SIZES)
    spread(DINOv3ViTModel(config), seed=3).save_pretrained(folder)
    DINOv3ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def write_siglip(folder: Path) -> None:
    """SigLIP 2 of a fixed resolution (32 pixels, so four tokens), which has the class of SigLIP."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    text = {"vocab_size": 64, "max_position_embeddings": 64, "projection_size": SIZES["hidden_size"], **SIZES}
    config = SiglipConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 16, **SIZES})
    spread(SiglipModel(config), seed=4).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def spread(model: Any, seed: int) -> Any:
    """Add noise to the weights until different images get clearly different embeddings."""
    import torch

    noise = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=noise) * 0.1)
    return model.eval()


ENCODERS: dict[str, Callable[[Path], None]] = {
    "openai/clip-vit-large-patch14": write_clip,
    "zer0int/LongCLIP-L-Diffusers": lambda folder: write_clip(folder, positions=248, seed=1),
    "facebook/dinov2-large": write_dinov2,
    "facebook/dinov3-vitl16-pretrain-lvd1689m": write_dinov3,
    "google/siglip2-so400m-patch16-512": write_siglip,
}
