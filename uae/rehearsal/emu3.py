"""Tiny Emu3 with random weights, in the layout of the released ports to transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from uae.rehearsal.language_models import PAD, WIDTH, randomise, subwords

BEGIN, END = "<|extra_203|>", "<|extra_204|>"
IMAGES = {
    "image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>",
}  # fmt: skip
CODES = 64  # entries of the image vocabulary
MARKS = [
    PAD, "<|im_start|>", "<|im_end|>", "<image>", "<|extra_200|>", "<|extra_201|>", BEGIN, END, "<|image token|>",
    "<|image start|>", "<|image end|>", *(f"<|visual token {code:06d}|>" for code in range(CODES)),
]  # fmt: skip
CHAT_TEMPLATE = (
    "You are a helpful assistant. "
    "{%- for message in messages -%}"
    "{%- if message.role != 'system' -%}{{- ' ' + message.role.upper() + ': ' -}}{%- endif -%}"
    "{%- for part in message.content -%}{%- if part.type == 'image' -%}<image>{%- endif -%}{%- endfor -%}"
    "{%- for part in message.content -%}{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"
)


def tokenizer() -> Any:
    """A byte-level tokenizer that adds no special tokens to a text."""
    from transformers import GPT2Tokenizer

    vocab, merges = subwords()
    made = GPT2Tokenizer(
        vocab, merges, bos_token=BEGIN, eos_token=END, pad_token=PAD, unk_token=PAD, padding_side="left",
        model_max_length=9216, extra_special_tokens=IMAGES,
    )  # fmt: skip
    # The library adds special tokens in another order, but the ids of visual tokens must be consecutive.
    made.add_tokens(MARKS, special_tokens=True)
    return made


def emu3(seed: int) -> tuple[Any, Any]:
    """Emu3 and its processor. A token covers 8 x 8 pixels, as released; images are scaled to 16 x 16 to 24 x 24 pixels."""
    from transformers import (
        Emu3Config,
        Emu3ForConditionalGeneration,
        Emu3ImageProcessor,
        Emu3Processor,
        GenerationConfig,
    )

    reader = tokenizer()
    ids = {f"{role}_token_id": getattr(reader, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    text = {
        "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": len(reader), "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, **ids,
    }  # fmt: skip
    codes = {
        "codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
        "hidden_size": 32,
    }  # fmt: skip
    config = Emu3Config(text_config=text, vq_config=codes, vocabulary_map=reader.get_vocab())
    model = Emu3ForConditionalGeneration(config)
    model.model.language_model = model.model.text_model  # the name that `randomise` expects
    randomise(model, reader, seed)
    del model.model.language_model
    model.generation_config = GenerationConfig(**ids)
    pixels = Emu3ImageProcessor(min_pixels=16 * 16, max_pixels=24 * 24, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return model, Emu3Processor(pixels, reader, chat_template=CHAT_TEMPLATE)


def save(seed: int) -> Callable[[Path], None]:
    """A function that writes Emu3 with the weights of a seed into a folder."""

    def write(folder: Path) -> None:
        model, processor = emu3(seed)
        model.bfloat16().save_pretrained(folder)
        processor.save_pretrained(folder)

    return write


EMU3: dict[str, Callable[[Path], None]] = {"BAAI/Emu3-Gen-hf": save(seed=10), "BAAI/Emu3-Chat-hf": save(seed=11)}
