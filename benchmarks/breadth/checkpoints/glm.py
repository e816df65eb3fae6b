"""A tiny random GLM-Image: a language model draws tokens of the image, and a diffusion transformer draws the image from them."""

from __future__ import annotations

from typing import Any

from benchmarks.breadth.checkpoints.parts import flow_scheduler
from uae.rehearsal.language_models import PAD, chat_template
from uae.rehearsal.language_models import tokenizer as subword_tokenizer
from uae.rehearsal.pipelines import autoencoder, t5_encoder

CODES = 128


def glm_image() -> Any:
    """GLM-Image: 32 pixels per token of the language model, 16 per token of the diffusion transformer."""
    from diffusers import GlmImagePipeline, GlmImageTransformer2DModel
    from transformers import ByT5Tokenizer, GlmImageConfig, GlmImageForConditionalGeneration

    processor = _processor()
    tokens = processor.tokenizer
    text = {
        "vocab_size": len(tokens) + 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "vision_vocab_size": CODES,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        "pad_token_id": tokens.pad_token_id, "eos_token_id": None,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 32, "patch_size": 8, "intermediate_size": 32}
    codes = {"embed_dim": 32, "num_embeddings": CODES, "latent_channels": 32}
    config = GlmImageConfig(
        text_config=text, vision_config=vision, vq_config=codes, image_token_id=tokens.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=CODES - 2, image_end_token_id=CODES - 1,
    )  # fmt: skip
    drawer = GlmImageForConditionalGeneration(config)
    drawer.generation_config.pad_token_id = tokens.pad_token_id
    transformer = GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=32,
        time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=CODES,
    )  # fmt: skip
    vae = autoencoder(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return GlmImagePipeline(ByT5Tokenizer(), processor, t5_encoder(32), drawer, vae, transformer, flow_scheduler())


def _processor() -> Any:
    from transformers import GlmImageImageProcessor, GlmImageProcessor

    roles = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    tokenizer = subword_tokenizer([PAD, "<|im_start|>", "<|im_end|>", *roles.values()], roles)
    tokenizer.bos_token = "<|im_start|>"
    return GlmImageProcessor(GlmImageImageProcessor(), tokenizer, chat_template("<|image|>", ""))
