"""Tiny random models in the layouts the encoders read."""

import json

import open_clip
import torch
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _spread(model):
    """Random weights of the usual tiny scale make every image look the same; these make images differ."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def clip(folder, positions=16):
    vision = CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=512, **SMALL)
    text = CLIPTextConfig(vocab_size=50, max_position_embeddings=positions, **SMALL)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    _spread(CLIPModel(config)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


def clip_vision(folder):
    vision = CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=24, **SMALL)
    _spread(CLIPVisionModelWithProjection(vision)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


def dinov2(folder):
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    _spread(Dinov2Model(config)).save_pretrained(folder)
    numbers = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
    BitImageProcessor(**numbers, **imagenet).save_pretrained(folder)
    return str(folder)


def dinov3(folder):
    config = DINOv3ViTConfig(image_size=32, patch_size=16, num_register_tokens=4, **SMALL)
    _spread(DINOv3ViTModel(config)).save_pretrained(folder)
    DINOv3ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


TINY_OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 16, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
}


def register_open_clip(folder):
    """Registers ``tiny-clip`` and ``tiny-clip-quickgelu``; returns the second one's model and its weights file."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny-clip.json").write_text(json.dumps(TINY_OPEN_CLIP))
    (folder / "tiny-clip-quickgelu.json").write_text(json.dumps({**TINY_OPEN_CLIP, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    model = _spread(open_clip.create_model("tiny-clip-quickgelu"))
    torch.save(model.state_dict(), folder / "weights.pt")
    return model, folder / "weights.pt"
