"""Tiny Janus-Pro with random weights, in the layout of the released port to transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uae.rehearsal.language_models import WIDTH, randomise, subwords

BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
IMAGES = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
ROLES = ["<|User|>", "<|Assistant|>"]
SIDE, PATCH, CODES = 16, 4, 64  # pixels of an image, pixels of a token, entries of the image vocabulary
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|User|>: ' if message.role|lower == 'user' else '<|Assistant|>: ' -}}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}"
    "{{- '' if loop.first else '\\n' -}}<image_placeholder>{{- '' if loop.last else '\\n' -}}"
    "{%- else -%}{{- part.text|trim -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '\\n\\n' if message.role|lower == 'user' else '" + END + "' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|Assistant|>:{%- endif -%}"
)


def tokenizer(pads_first: int = 0) -> Any:
    """A byte-level tokenizer that adds a begin token to every text and pads on the left.

    Args:
        pads_first: Number of tokens between the end token and the padding token. It differs between the 1B and 7B models.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab, merges = subwords()
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BEGIN, END, *(f"<reserved_{i}>" for i in range(pads_first)), PAD])
    begin = (BEGIN, backend.token_to_id(BEGIN))
    backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BEGIN, eos_token=END, pad_token=PAD, padding_side="left",
        model_max_length=16384, extra_special_tokens=IMAGES,
    )  # fmt: skip
    made.add_tokens(ROLES, special_tokens=True)
    return made


def janus_pro(layers: int, seed: int, pads_first: int = 0) -> tuple[Any, Any]:
    """Janus-Pro and its processor, with 16 tokens per image, read or drawn, instead of 576."""
    from transformers import (
        GenerationConfig,
        JanusConfig,
        JanusForConditionalGeneration,
        JanusImageProcessor,
        JanusProcessor,
    )

    reader, tokens = tokenizer(pads_first), (SIDE // PATCH) ** 2
    ids = {f"{role}_token_id": getattr(reader, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    text = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": len(reader) + 8, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **ids,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH,
        "projection_dim": WIDTH, "num_image_tokens": tokens, "mlp_ratio": 2.0,
    }  # fmt: skip
    codes = {
        "embed_dim": 8, "num_embeddings": CODES, "latent_channels": 32, "base_channels": 32, "num_res_blocks": 1,
        "channel_multiplier": [1, 1, 1], "projection_dim": WIDTH, "image_token_embed_dim": WIDTH,
    }  # fmt: skip
    config = JanusConfig(
        text_config=text, vision_config=vision, vq_config=codes, tie_word_embeddings=False,
        image_token_id=reader.convert_tokens_to_ids(IMAGES["image_token"]),
    )  # fmt: skip
    model = randomise(JanusForConditionalGeneration(config), reader, seed)
    begin = {"boi_token_id": reader.convert_tokens_to_ids(IMAGES["boi_token"])}
    model.generation_config = GenerationConfig(**ids, temperature=1.0, guidance_scale=5.0, generation_kwargs=begin)
    pixels = JanusImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = JanusProcessor(pixels, reader, chat_template=CHAT_TEMPLATE, use_default_system_prompt=True, num_image_tokens=tokens)
    return model, processor


def save(layers: int, seed: int, pads_first: int) -> Callable[[Path], None]:
    """A function that writes Janus-Pro into a folder.

    The tokenizer's class is given as ``LlamaTokenizer`` although it is byte-level, as in the released port.
    """

    def write(folder: Path) -> None:
        model, processor = janus_pro(layers, seed, pads_first)
        model.bfloat16().save_pretrained(folder)
        processor.save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "LlamaTokenizer"}, indent=2))

    return write


JANUS: dict[str, Callable[[Path], None]] = {
    "deepseek-community/Janus-Pro-1B": save(layers=2, seed=8, pads_first=1),
    "deepseek-community/Janus-Pro-7B": save(layers=3, seed=9, pads_first=14),
}
