"""A tiny random Kolors. Its tokenizer needs the package sentencepiece."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from uae.rehearsal.language_models import SENTENCES
from uae.rehearsal.pipelines import autoencoder

ROOM = tempfile.TemporaryDirectory()  # holds the file that the tokenizer reads until it is saved; removed when Python ends


def kolors() -> Any:
    """Kolors: ChatGLM 3 and a U-Net.

    Raises:
        ImportError: The package sentencepiece is not installed.
    """
    import sentencepiece
    from diffusers import EulerDiscreteScheduler, KolorsPipeline, UNet2DConditionModel
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    file = Path(ROOM.name, "tokenizer.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(file.with_suffix("")), vocab_size=120, hard_vocab_limit=False,
        byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = ChatGLMTokenizer(str(file))
    reader = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2, padded_vocab_size=256, hidden_size=16, ffn_hidden_size=16, kv_channels=8, num_attention_heads=2,
            seq_length=256, original_rope=True, multi_query_attention=True, multi_query_group_num=1, add_qkv_bias=True,
        )
    )  # fmt: skip
    for name, weight in reader.named_parameters():
        if "norm" in name:
            weight.data.fill_(1.0)  # its class leaves them as they are in memory
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2), use_linear_projection=True, cross_attention_dim=8, encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj", addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=1, projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
    return KolorsPipeline(autoencoder(), reader, tokenizer, unet, scheduler)
