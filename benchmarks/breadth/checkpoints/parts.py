"""Text encoders, tokenizers and autoencoders that several tiny pipelines share."""

from __future__ import annotations

from typing import Any

from uae.rehearsal.language_models import QWEN, chat_template, qwen2_5_vl_processor
from uae.rehearsal.language_models import tokenizer as subword_tokenizer
from uae.rehearsal.tokenizers import qwen_tokenizer

TEMPLATE = chat_template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def chat_tokenizer() -> Any:
    """The tokenizer of Qwen, with a chat template."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def qwen2_5_processor() -> Any:
    """The processor of Qwen2.5-VL; it pads on the right, as the pipelines' checkpoints do."""
    processor = qwen2_5_vl_processor()
    processor.tokenizer.padding_side = "right"
    return processor


def qwen3_processor() -> Any:
    """The processor of Qwen3-VL; it pads on the right."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    sizes: dict[str, Any] = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    tokenizer = subword_tokenizer(QWEN)
    tokenizer.padding_side = "right"
    return Qwen3VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer, Qwen3VLVideoProcessor(**sizes), TEMPLATE)


def pixtral_processor() -> Any:
    """The processor of Mistral Small 3 (FLUX.2)."""
    from transformers import PixtralImageProcessor, PixtralProcessor

    tokenizer = subword_tokenizer([*QWEN, "[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    tokenizer.padding_side = "left"
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=14, chat_template=TEMPLATE)


def language_model(kind: str, tokenizer: Any, width: int = 16, layers: int = 2, **settings: Any) -> Any:
    """A decoder-only language model of transformers.

    Args:
        kind: Name of its class, e.g. "Qwen3Model".
        tokenizer: Its tokenizer.
        width: Width of its hidden states.
        layers: Number of its layers.
        settings: Further arguments of its configuration.
    """
    import transformers

    built = getattr(transformers, kind)
    return built(built.config_class(**{**decoder(tokenizer, width, layers), **settings}))


def vision_language_model(kind: str, tokenizer: Any, width: int = 16, layers: int = 2) -> Any:
    """A Qwen3-VL or a Mistral 3, of which pipelines use the language model."""
    import transformers

    built = getattr(transformers, kind)
    text = decoder(tokenizer, width, layers)
    vision: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    if kind.startswith("Mistral3"):
        text |= {"model_type": "mistral", "sliding_window": None}
        vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        vision |= {"num_hidden_layers": 1}
        return built(built.config_class(text_config=text, vision_config=vision, image_token_index=1))
    text |= {"rope_parameters": ROPE}
    vision |= {"depth": 1, "out_hidden_size": width, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return built(built.config_class(text_config=text, vision_config=vision))


def decoder(tokenizer: Any, width: int, layers: int) -> dict[str, Any]:
    """The configuration of a small decoder."""
    return {
        "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "max_position_embeddings": 4096,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def flux2_autoencoder() -> Any:
    """The autoencoder of FLUX.2: 8 pixels per latent, 2 x 2 latents per token."""
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(4,) * 4,
        layers_per_block=1, norm_num_groups=2, latent_channels=4, mid_block_add_attention=False,
    )  # fmt: skip


def qwen_autoencoder() -> Any:
    """The autoencoder of Qwen-Image: 8 pixels per latent."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[3.0] * 4
    )


def flow_scheduler(**settings: Any) -> Any:
    """Euler's method of flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)
