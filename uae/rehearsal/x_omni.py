"""Tiny X-Omni with random weights, in the layout of the released checkpoint: weights by their official names, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uae.rehearsal.language_models import QWEN, WIDTH, chat_template, randomise
from uae.rehearsal.language_models import tokenizer as qwen_tokenizer

CODES, MULTIMODAL = 64, 80  # codes of images, and rows of the multimodal tables
MARKS = ("<SOM>", "<EOM>", "<IMAGE>")
LAYERS, FIRST, LAST = 5, 2, 1  # layers, and how many of them are image-only at the beginning and at the end
FEATURES, CODE_WIDTH, SIDE = 64, 48, 8  # width of features and of codes; patches on a side of the image with position embeddings
VIT, PROJECTOR = "siglip_vit.pth", "vq_projector.pth"


def tokenizer() -> Any:
    """A Qwen2 tokenizer with codes and marks behind its text tokens; three text ids stand for nothing."""
    made = qwen_tokenizer([*QWEN, *(f"<|unused_{number}|>" for number in range(3))])
    made.add_tokens([*(f"<MM-Token-{code}>" for code in range(CODES)), *MARKS], special_tokens=True)
    made.chat_template = chat_template("", "", "You are a helpful assistant.")
    return made


def language_model(seed: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The tokenizer, the settings of ``config.json`` and the weights of the language model.

    Both vocabularies are cut out of the tables of one Qwen2, and its norm is there twice.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    reader = tokenizer()
    text = reader.convert_tokens_to_ids("<MM-Token-0>")
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    ids = {"eos_token_id": reader.eos_token_id, "pad_token_id": reader.pad_token_id}
    model: Any = Qwen2ForCausalLM(Qwen2Config(vocab_size=text + MULTIMODAL, **sizes, **ids))
    vars(model.model)["language_model"] = model.model  # the name that `randomise` expects; a module cannot contain itself
    randomise(model, reader, seed)
    del vars(model.model)["language_model"]
    state = model.state_dict()
    table, norm, head = (state.pop(f"{name}.weight") for name in ("model.embed_tokens", "model.norm", "lm_head"))
    noise = torch.Generator().manual_seed(seed)
    state |= {
        "model.lm_embed_tokens.weight": table[:text], "model.mm_embed_tokens.weight": table[text:],
        "lm_head.weight": head[:text], "mm_head.weight": head[text:],
        "model.lm_norm.weight": norm, "model.mm_norm.weight": norm * (1 + 0.1 * torch.randn(norm.shape, generator=noise)),
    }  # fmt: skip
    config = {
        "architectures": ["XOmniForCausalLM"], "model_type": "x-omni", "vocab_size": text, **sizes, "rope_theta": 1000000.0, **ids,
        "num_mm_adap_layers": FIRST, "num_mm_head_layers": LAST, "mm_vocab_size": MULTIMODAL, "image_vocab_size": CODES,
        "mm_special_tokens": list(MARKS), "vision_config": vision(), "torch_dtype": "bfloat16",
    }  # fmt: skip
    return reader, config, state


def vision() -> dict[str, Any]:
    """The settings of the image tokenizer and of the pixel decoder."""
    return {
        "dtype": "float32",
        "transform": {"short_size": 32, "long_size": 96, "patch_size": 16, "min_short_size": 16, "max_aspect_ratio": 3.0},
        "encoder": {
            "siglip_name": "siglip2_giant_patch16_384", "siglip_path": VIT, "projector_path": PROJECTOR, "z_channels": FEATURES,
            "codebook_size": CODES, "codebook_dim": CODE_WIDTH,
        },
        "decoder": {
            "model_path": "diffusers", "upscale_factor": 16, "num_inference_steps": 2, "cfg_scale": 2.0, "cfg_scale_2": 2.0
        },
    }  # fmt: skip


def image_tokenizer(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of the image transformer and of the projector. The former has a last norm, which is not used."""
    import torch

    noise = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Any:
        inputs = torch.Size(shape[1:]).numel()
        return torch.randn(shape, generator=noise) * inputs**-0.5

    def layer(name: str, *shape: int) -> dict[str, Any]:
        return {f"{name}.weight": weights(*shape), f"{name}.bias": 0.1 * weights(shape[0], 1)[:, 0]}

    def norm(name: str) -> dict[str, Any]:
        return {f"{name}.weight": 1 + 0.1 * weights(FEATURES, 1)[:, 0], f"{name}.bias": 0.1 * weights(FEATURES, 1)[:, 0]}

    tower = {"pos_embed": weights(1, SIDE**2, FEATURES) * 4, **layer("patch_embed.proj", FEATURES, 3, 16, 16), **norm("norm")}
    for number in range(2):
        tower |= {
            **norm(f"blocks.{number}.norm1"), **norm(f"blocks.{number}.norm2"),
            **layer(f"blocks.{number}.attn.qkv", 3 * FEATURES, FEATURES), **layer(f"blocks.{number}.attn.proj", FEATURES, FEATURES),
            **layer(f"blocks.{number}.mlp.fc1", 4 * FEATURES, FEATURES), **layer(f"blocks.{number}.mlp.fc2", FEATURES, 4 * FEATURES),
        }  # fmt: skip
    projector = {
        "quantize.embedding.weight": weights(CODES, CODE_WIDTH) * 3, **layer("quant_conv", CODE_WIDTH, FEATURES, 1, 1),
        **layer("post_quant_conv", FEATURES, CODE_WIDTH, 1, 1),
    }  # fmt: skip
    for number in range(2):
        for part in (1, 2):
            projector |= layer(f"post_conv.{number}.conv{part}", FEATURES, FEATURES, 3, 3)
            projector |= norm(f"post_conv.{number}.norm{part}")
    return tower, projector


def decoder(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and weights of the transformer that turns features into pixels; it fits the stand-in of FLUX.1-dev."""
    import torch
    from diffusers import FluxTransformer2DModel

    sizes: dict[str, Any] = {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": [2, 2, 4],
    }  # fmt: skip
    transformer: Any = FluxTransformer2DModel(**sizes)
    state: dict[str, Any] = transformer.state_dict()
    state["siglip_embed.weight"] = torch.empty(16, FEATURES)
    noise = torch.Generator().manual_seed(seed)
    for weight in state.values():
        weight.normal_(0, weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1, generator=noise)
    return {"_class_name": "FluxTransformer2DModelWithSigLIP", **sizes, "siglip_channels": FEATURES}, state


def save(seed: int) -> Callable[[Path], None]:
    """A function that writes X-Omni with the weights of a seed into a folder."""

    def write(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        reader, config, state = language_model(seed)
        reader.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        half = {name: weight.bfloat16().contiguous().clone() for name, weight in state.items()}
        save_file(half, folder / "model.safetensors", {"format": "pt"})
        tower, projector = image_tokenizer(seed)
        torch.save(tower, folder / VIT)
        torch.save(projector, folder / PROJECTOR)
        settings, weights = decoder(seed)
        place = folder / "diffusers"
        place.mkdir()
        (place / "config.json").write_text(json.dumps(settings, indent=1))
        save_file(weights, place / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    return write


X_OMNI: dict[str, Callable[[Path], None]] = {"X-Omni/X-Omni-En": save(seed=12)}
