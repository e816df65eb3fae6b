"""Tiny random text-to-image pipelines of the classes of diffusers, in its layout.

Every pipeline has text encoders, tokenizers (one token per character), an autoencoder and a scheduler, and draws images of
32 x 32 pixels or more. The weights are random but the same in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uae.rehearsal.tokenizers import (
    clip_tokenizer,
    gemma_tokenizer,
    llama_tokenizer,
    qwen_tokenizer,
    t5_tokenizer,
)


def write_sd3(folder: Path, joint_attention_dim: int = 32, pooled_projection_dim: int = 32) -> None:
    """Stable Diffusion 3: two CLIP encoders and a T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    def create() -> Any:
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=joint_attention_dim, caption_projection_dim=16,
            pooled_projection_dim=pooled_projection_dim, pos_embed_max_size=96, qk_norm="rms_norm",
        )  # fmt: skip
        half = pooled_projection_dim // 2
        width = min(16, joint_attention_dim // 2)
        return StableDiffusion3Pipeline(
            transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(shift_factor=0.06),
            clip_encoder(width, half), clip_tokenizer(), clip_encoder(width, pooled_projection_dim - half), clip_tokenizer(),
            t5_encoder(joint_attention_dim), t5_tokenizer(256),
        )  # fmt: skip

    write(folder, create)


def write_flux(folder: Path, joint_attention_dim: int = 32, pooled_projection_dim: int = 16, guidance_embeds: bool = True) -> None:
    """FLUX: a CLIP text encoder for the pooled vector and a T5 for the token embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    def create() -> Any:
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=joint_attention_dim, pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        return FluxPipeline(
            scheduler, autoencoder(shift_factor=0.1), clip_encoder(pooled_projection_dim, None), clip_tokenizer(),
            t5_encoder(joint_attention_dim), t5_tokenizer(512), transformer,
        )  # fmt: skip

    write(folder, create)


def write_sana(folder: Path, caption_channels: int = 32) -> None:
    """Sana: Gemma 2 as the text encoder and a deep-compression autoencoder (32 pixels per latent)."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    def create() -> Any:
        tokenizer = gemma_tokenizer()
        config = Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=caption_channels, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, max_position_embeddings=4096,
        )  # fmt: skip
        transformer = SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
            caption_channels=caption_channels, sample_size=32,
        )  # fmt: skip
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        )
        return SanaPipeline(tokenizer, Gemma2Model(config), deep_autoencoder(), transformer, scheduler)

    write(folder, create)


def write_qwen_image(folder: Path, joint_attention_dim: int = 32) -> None:
    """Qwen-Image: Qwen2.5-VL as the text encoder."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    def create() -> Any:
        tokenizer = qwen_tokenizer()
        transformer = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=joint_attention_dim, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        autoencoder = AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[3.0] * 4
        )
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
        encoder = qwen_encoder(joint_attention_dim, tokenizer)
        return QwenImagePipeline(scheduler, autoencoder, encoder, tokenizer, transformer)

    write(folder, create)


def write_sdxl(folder: Path, cross_attention_dim: int = 32, pooled_projection_dim: int = 16) -> None:
    """Stable Diffusion XL: a U-Net and two CLIP encoders."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    def create() -> Any:
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(1, 2), use_linear_projection=True, cross_attention_dim=cross_attention_dim,
            addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=1,
            projection_class_embeddings_input_dim=pooled_projection_dim + 6 * 8,
        )  # fmt: skip
        half = cross_attention_dim // 2
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        )
        return StableDiffusionXLPipeline(
            autoencoder(), clip_encoder(half, None), clip_encoder(cross_attention_dim - half, pooled_projection_dim), clip_tokenizer(),
            clip_tokenizer(), unet, scheduler, add_watermarker=False,
        )  # fmt: skip

    write(folder, create)


def write_omnigen(folder: Path) -> None:
    """OmniGen: one transformer reads the caption and draws, so it takes no embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, OmniGenPipeline, OmniGenTransformer2DModel

    def create() -> Any:
        tokenizer = llama_tokenizer()
        transformer = OmniGenTransformer2DModel(
            in_channels=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, num_layers=1,
            pad_token_id=0, vocab_size=len(tokenizer), rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
            pos_embed_max_size=16, time_step_dim=16,
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
        return OmniGenPipeline(transformer, scheduler, autoencoder(), tokenizer)

    write(folder, create)


PIPELINES: dict[str, Callable[[Path], None]] = {
    "sd3": write_sd3,
    "flux": write_flux,
    "sana": write_sana,
    "qwen_image": write_qwen_image,
    "sdxl": write_sdxl,
    "omnigen": write_omnigen,
}


def write(folder: Path, create: Callable[[], Any]) -> None:
    """Create a pipeline, set random weights with which every token of a caption changes the image, and save it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = create()
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name != "vae":
                for weight in part.parameters():
                    if weight.ndim > 1 and weight.numel():
                        nn.init.normal_(weight, 0, weight[0].numel() ** -0.5)
    pipe.save_pretrained(folder)


def autoencoder(shift_factor: float | None = None, **settings: Any) -> Any:
    """An autoencoder with 8 pixels per latent. ``settings`` are further arguments of its class."""
    from diffusers import AutoencoderKL

    usual: dict[str, Any] = {"latent_channels": 4, "scaling_factor": 1.5, "shift_factor": shift_factor}
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(4,) * 4,
        layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False, **usual | settings,
    )  # fmt: skip


def deep_autoencoder() -> Any:
    """An autoencoder with 32 pixels per latent."""
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(4,) * 6, decoder_block_out_channels=(4,) * 6,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6, encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6, scaling_factor=0.41407,
    )  # fmt: skip


def clip_encoder(width: int, projection: int | None, positions: int = 77) -> Any:
    """A CLIP text encoder. ``projection`` is the width of the projected vector; None gives an encoder without projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, projection_dim=projection or width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=positions, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def t5_encoder(width: int) -> Any:
    """The encoder of T5."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer(512)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def qwen_encoder(width: int, tokenizer: Any, layers: int = 1) -> Any:
    """The language model of Qwen2.5-VL, with an image tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": len(tokenizer), "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [width // 4 - 2 * (width // 12), *[width // 12] * 2]
        },
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
