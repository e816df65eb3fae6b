"""Tiny random checkpoints of the other pipelines: flow matching with T5 or Gemma, and diffusion."""

from __future__ import annotations

from typing import Any

from benchmarks.breadth.checkpoints.parts import flow_scheduler, language_model
from uae.rehearsal.pipelines import autoencoder, clip_encoder, deep_autoencoder, t5_encoder
from uae.rehearsal.tokenizers import clip_tokenizer, gemma_tokenizer, t5_tokenizer

HEADS: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2}


def aura_flow() -> Any:
    """AuraFlow: attends to padding."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer(512)
    config = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, caption_projection_dim=16,
        joint_attention_dim=32, pos_embed_max_size=256, **HEADS,
    )  # fmt: skip
    return AuraFlowPipeline(tokenizer, UMT5EncoderModel(config), autoencoder(), transformer, flow_scheduler(shift=1.7))


def chroma() -> Any:
    """Chroma: a mask of type float."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32, axes_dims_rope=(2, 2, 4),
        approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16, **HEADS,
    )  # fmt: skip
    return ChromaPipeline(flow_scheduler(), autoencoder(shift_factor=0.1), t5_encoder(32), t5_tokenizer(512), transformer)


def cogview4() -> Any:
    """CogView4: padding on the left that nothing masks."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    tokenizer = gemma_tokenizer()
    tokenizer.padding_side = "left"
    transformer = CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=32, time_embed_dim=8,
        condition_dim=4,
    )  # fmt: skip
    reader = language_model("GlmModel", tokenizer, width=32)
    scheduler = flow_scheduler(use_dynamic_shifting=True, time_shift_type="linear")
    return CogView4Pipeline(tokenizer, reader, autoencoder(), transformer, scheduler)


def lumina2() -> Any:
    """Lumina Image 2: Gemma 2."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=2,
        multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(512, 64, 64), cap_feat_dim=16,
    )  # fmt: skip
    reader = language_model("Gemma2Model", tokenizer, query_pre_attn_scalar=8)
    return Lumina2Pipeline(transformer, flow_scheduler(shift=6.0), autoencoder(shift_factor=0.1), reader, tokenizer)


def lumina() -> Any:
    """Lumina-Next: Gemma."""
    from diffusers import LuminaNextDiT2DModel, LuminaPipeline

    tokenizer = gemma_tokenizer()
    transformer = LuminaNextDiT2DModel(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=2, num_attention_heads=2, num_kv_heads=2, multiple_of=16,
        cross_attention_dim=16,
    )  # fmt: skip
    reader = language_model("GemmaForCausalLM", tokenizer)
    return LuminaPipeline(transformer, flow_scheduler(), autoencoder(), reader, tokenizer)


def prx() -> Any:
    """PRX: T5Gemma."""
    from diffusers import PRXPipeline, PRXTransformer2DModel

    transformer = PRXTransformer2DModel(
        patch_size=2, in_channels=4, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    return PRXPipeline(transformer, flow_scheduler(shift=3.0), *_t5_gemma(), autoencoder(shift_factor=0.0))


def prx_pixel() -> Any:
    """PRX without an autoencoder: it predicts the picture."""
    from diffusers import PRXPixelPipeline, PRXTransformer2DModel

    from benchmarks.breadth.checkpoints.parts import chat_tokenizer

    tokenizer = chat_tokenizer()
    transformer = PRXTransformer2DModel(
        patch_size=8, in_channels=3, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4],
        bottleneck_size=8, resolution_embeds=True,
    )  # fmt: skip
    reader = language_model("Qwen3Model", tokenizer)
    return PRXPixelPipeline(transformer, flow_scheduler(), reader, tokenizer)


def _t5_gemma() -> tuple[Any, Any]:
    from transformers import T5GemmaConfig
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    tokenizer = gemma_tokenizer()
    tokenizer.model_max_length = 64
    parts: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "layer_types": ["full_attention"],
        "query_pre_attn_scalar": 8,
    }  # fmt: skip
    module = T5GemmaModuleConfig(**parts)
    flat = {name: value for name, value in module.to_dict().items() if name not in ("model_type", "is_encoder_decoder")}
    return T5GemmaEncoder(T5GemmaConfig(encoder=module, is_encoder_decoder=False, **flat)), tokenizer


def bria() -> Any:
    """Bria 3.2: T5."""
    from diffusers import BriaPipeline, BriaTransformer2DModel

    transformer = BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4], **HEADS,
    )  # fmt: skip
    return BriaPipeline(transformer, flow_scheduler(), autoencoder(shift_factor=0.0), t5_encoder(32), t5_tokenizer(512))


def bria_fibo() -> Any:
    """FIBO: all layers of SmolLM3."""
    from diffusers import AutoencoderKLWan, BriaFiboPipeline, BriaFiboTransformer2DModel

    tokenizer = t5_tokenizer(512)
    transformer = BriaFiboTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=64, text_encoder_dim=32, pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4], **HEADS,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    reader = language_model("SmolLM3ForCausalLM", tokenizer, width=32, vocab_size=128256)  # it names the number of a token
    return BriaFiboPipeline(transformer, flow_scheduler(), vae, reader, tokenizer)


def stable_diffusion() -> Any:
    """Stable Diffusion 1.5, with its safety checker."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    scheduler = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16}
    config = CLIPConfig(text_config=tower, vision_config={**tower, "image_size": 224}, projection_dim=16)
    return StableDiffusionPipeline(
        autoencoder(), clip_encoder(32, None), clip_tokenizer(), _unet(), scheduler, StableDiffusionSafetyChecker(config),
        CLIPImageProcessor(), requires_safety_checker=True,
    )  # fmt: skip


def latent_consistency() -> Any:
    """A latent consistency model: the guidance scale is an input of its U-Net."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    return LatentConsistencyModelPipeline(
        autoencoder(), clip_encoder(32, None), clip_tokenizer(), _unet(time_cond_proj_dim=8), LCMScheduler(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def _unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, cross_attention_dim=32, **settings,
    )  # fmt: skip


def pixart_sigma() -> Any:
    """PixArt-Sigma: T5 and a diffusion transformer."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, caption_channels=32, in_channels=4, cross_attention_dim=16, out_channels=8, **HEADS
    )
    return PixArtSigmaPipeline(t5_tokenizer(300), t5_encoder(32), autoencoder(), transformer, DDIMScheduler())


def hunyuan_dit() -> Any:
    """HunyuanDiT: BERT and T5."""
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = [f"{mark}{chr(code)}" for mark in ("", "##") for code in range(33, 127)]
    words = BertTokenizer(vocab={piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters])})
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformer = HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, cross_attention_dim=32,
        cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=16, activation_fn="gelu-approximate",
    )  # fmt: skip
    return HunyuanDiTPipeline(
        autoencoder(), BertModel(config), words, transformer, DDPMScheduler(), None, None, False, t5_encoder(32), t5_tokenizer(256)
    )


def cogview3_plus() -> Any:
    """CogView3 Plus: T5."""
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusPipeline, CogView3PlusTransformer2DModel

    transformer = CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=32, time_embed_dim=8,
        condition_dim=2, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    return CogView3PlusPipeline(t5_tokenizer(224), t5_encoder(32), autoencoder(), transformer, CogVideoXDDIMScheduler())


def sana_sprint() -> Any:
    """SANA-Sprint: two steps, and the guidance scale is an input."""
    from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

    tokenizer = gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=16, sample_size=32, qk_norm="rms_norm_across_heads", guidance_embeds=True, **HEADS,
    )  # fmt: skip
    reader = language_model("Gemma2Model", tokenizer, query_pre_attn_scalar=8)
    return SanaSprintPipeline(tokenizer, reader, deep_autoencoder(), transformer, SCMScheduler())
