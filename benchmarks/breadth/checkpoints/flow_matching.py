"""Tiny random checkpoints of flow-matching pipelines whose text encoder is a language model."""

from __future__ import annotations

from typing import Any

from benchmarks.breadth.checkpoints.parts import (
    chat_tokenizer,
    flow_scheduler,
    flux2_autoencoder,
    language_model,
    pixtral_processor,
    qwen2_5_processor,
    qwen3_processor,
    qwen_autoencoder,
    vision_language_model,
)
from uae.rehearsal.pipelines import autoencoder, clip_encoder, qwen_encoder, t5_encoder
from uae.rehearsal.tokenizers import clip_tokenizer, llama_tokenizer, qwen_tokenizer, t5_tokenizer

HEADS: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2}


def flux2() -> Any:
    """FLUX.2: three layers of Mistral Small 3, padded to 512 tokens."""
    from diffusers import Flux2Pipeline, Flux2Transformer2DModel

    processor = pixtral_processor()
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=48, axes_dims_rope=(2, 2, 2, 2), **HEADS
    )
    reader = vision_language_model("Mistral3ForConditionalGeneration", processor.tokenizer, layers=31)
    return Flux2Pipeline(flow_scheduler(), flux2_autoencoder(), reader, processor, transformer)


def flux2_klein(distilled: bool = False) -> Any:
    """FLUX.2 klein: three layers of Qwen3."""
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    tokenizer = chat_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=48, axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False, **HEADS,
    )  # fmt: skip
    reader = language_model("Qwen3ForCausalLM", tokenizer, layers=28)
    return Flux2KleinPipeline(flow_scheduler(), flux2_autoencoder(), reader, tokenizer, transformer, is_distilled=distilled)


def flux2_klein_distilled() -> Any:
    """FLUX.2 klein, distilled for drawing without guidance."""
    return flux2_klein(distilled=True)


def z_image() -> Any:
    """Z-Image: embeddings are a list, and guidance counts from 0."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    tokenizer = chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[1536, 64, 64],
    )  # fmt: skip
    reader = language_model("Qwen3Model", tokenizer)
    return ZImagePipeline(flow_scheduler(shift=3.0), autoencoder(shift_factor=0.1), reader, tokenizer, transformer)


def qwen_image_2_1() -> Any:
    """Qwen-Image 2.1: pictures with transparency, and a cache of the text's keys and values."""
    from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel

    processor = qwen3_processor()
    vae = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, context_in_dim=16, axes_dims_rope=(2, 2, 4), **HEADS
    )
    reader = vision_language_model("Qwen3VLForConditionalGeneration", processor.tokenizer)
    return QwenImage21Pipeline(flow_scheduler(use_dynamic_shifting=True), vae, reader, processor, transformer)


def krea2() -> Any:
    """Krea 2: several layers of Qwen3-VL, masks of type bool, guidance that counts from 0."""
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    tokenizer = chat_tokenizer()
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1,
        text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    reader = vision_language_model("Qwen3VLModel", tokenizer)
    scheduler = flow_scheduler(use_dynamic_shifting=True)
    return Krea2Pipeline(scheduler, qwen_autoencoder(), reader, tokenizer, transformer, text_encoder_select_layers=(0, 1, 2))


def ernie_image() -> Any:
    """ERNIE-Image with its rewriter of prompts."""
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel

    tokenizer = chat_tokenizer()
    transformer = ErnieImageTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16, out_channels=16, text_in_dim=16,
        rope_axes_dim=(4, 2, 2),
    )  # fmt: skip
    reader = vision_language_model("Mistral3Model", tokenizer)
    rewriter = language_model("Ministral3ForCausalLM", tokenizer)
    rewriting = chat_tokenizer()
    rewriting.model_max_length = 4
    return ErnieImagePipeline(transformer, flux2_autoencoder(), reader, tokenizer, flow_scheduler(), rewriter, rewriting)


def longcat_image() -> Any:
    """LongCat-Image: draws from text only."""
    from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

    processor = qwen2_5_processor()
    transformer = LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(2, 2, 4),
        **HEADS,
    )  # fmt: skip
    vae = autoencoder(shift_factor=0.1, latent_channels=16)
    reader = qwen_encoder(32, processor.tokenizer)
    return LongCatImagePipeline(flow_scheduler(), vae, reader, processor.tokenizer, processor, transformer)


def ovis_image() -> Any:
    """Ovis-Image: one layer of Qwen3, padded."""
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    tokenizer = chat_tokenizer()
    transformer = OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16, axes_dims_rope=(2, 2, 4), **HEADS
    )
    reader = language_model("Qwen3Model", tokenizer)
    return OvisImagePipeline(flow_scheduler(), autoencoder(shift_factor=0.1), reader, tokenizer, transformer)


def nucleus_image() -> Any:
    """Nucleus-Image: the eighth layer from the end of Qwen3-VL."""
    from diffusers import NucleusMoEImagePipeline, NucleusMoEImageTransformer2DModel

    processor = qwen3_processor()
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(2, 2, 4), moe_enabled=False,
        capacity_factors=[8.0, 8.0], **HEADS,
    )  # fmt: skip
    reader = vision_language_model("Qwen3VLForConditionalGeneration", processor.tokenizer, layers=8)
    return NucleusMoEImagePipeline(transformer, flow_scheduler(), qwen_autoencoder(), reader, processor)


def kandinsky_5() -> Any:
    """Kandinsky 5: Qwen2.5-VL and CLIP."""
    from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel

    processor = qwen2_5_processor()
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2), model_dim=16, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(1, 1, 2), visual_cond=False, attention_type="regular",
    )  # fmt: skip
    reader = qwen_encoder(32, processor.tokenizer)
    return Kandinsky5T2IPipeline(
        transformer=transformer, vae=autoencoder(), text_encoder=reader, tokenizer=processor, text_encoder_2=clip_encoder(16, None),
        tokenizer_2=clip_tokenizer(), scheduler=flow_scheduler(shift=7.0),
    )  # fmt: skip


def hunyuan_image() -> Any:
    """HunyuanImage 2.1: guided by components of the checkpoint."""
    from diffusers import AutoencoderKLHunyuanImage, HunyuanImagePipeline, HunyuanImageTransformer2DModel
    from diffusers.guiders import AdaptiveProjectedMixGuidance
    from transformers import ByT5Tokenizer

    tokenizer = qwen_tokenizer()
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=32, text_embed_2_dim=32, rope_axes_dim=(4, 4),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64, 64, 64), layers_per_block=1,
        scaling_factor=0.5, spatial_compression_ratio=8, sample_size=128,
    )  # fmt: skip
    guiders = [AdaptiveProjectedMixGuidance(guidance_scale=3.0, adaptive_projected_guidance_start_step=step) for step in (1, 2)]
    return HunyuanImagePipeline(
        flow_scheduler(shift=7.0), vae, qwen_encoder(32, tokenizer, layers=2), tokenizer, t5_encoder(32), ByT5Tokenizer(), transformer,
        *guiders,
    )  # fmt: skip


def hidream_image() -> Any:
    """HiDream-Image: two CLIP, a T5 and a Llama."""
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

    tokenizer = llama_tokenizer()
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, caption_channels=[32, 16], text_emb_dim=32,
        axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1), **HEADS,
    )  # fmt: skip
    clips = [part for _ in range(2) for part in (clip_encoder(16, 16, positions=128), clip_tokenizer())]
    reader = language_model("LlamaForCausalLM", tokenizer, pad_token_id=0)
    readers = [*clips, t5_encoder(32), t5_tokenizer(128), reader, tokenizer]
    return HiDreamImagePipeline(flow_scheduler(shift=3.0), autoencoder(shift_factor=0.1), *readers, transformer)
