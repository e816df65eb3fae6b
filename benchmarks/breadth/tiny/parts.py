"""What the tiny checkpoints of all families are made of: a tokenizer, a text decoder, image towers and their scales."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from uae.rehearsal import language_models

BEGIN = "<s>"
WIDTH, HEADS, HEAD = 64, 4, 16  # of text decoders: hidden size, heads of attention, size of a head
MOMENTS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGE, VIDEO = "<image>", "<video>"


@dataclass
class Parts:
    """A model without weights and its processor.

    Args:
        kind: Name of the model's class in transformers.
        config: Its configuration.
        processor: Its processor, with a chat template.
        ends: Further tokens that end a caption.
    """

    kind: str
    config: Any
    processor: Any
    ends: list[int] = field(default_factory=list)


def tokenizer(specials: list[str], roles: dict[str, str] | None = None, begin: bool = False) -> Any:
    """A byte-level tokenizer; with ``begin``, one that puts a begin token before every text, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    base = language_models.tokenizer([language_models.PAD, "<|im_start|>", language_models.END, BEGIN, *specials])
    core = base.backend_tokenizer
    if begin:
        core.post_processor = TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, base.convert_tokens_to_ids(BEGIN))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=language_models.END, pad_token=language_models.PAD, unk_token=language_models.PAD,
        bos_token=BEGIN, model_max_length=32768, padding_side="left", **({"extra_special_tokens": roles} if roles else {}),
    )  # fmt: skip
    made.model_input_names = ["input_ids", "attention_mask"]
    return made


def template(image: str = IMAGE, begin: bool = False) -> str:
    """A chat template; with ``begin``, one that writes the begin token itself, as released ones do."""
    written = "{{- '" + BEGIN + "' -}}" if begin else ""
    return written + language_models.chat_template(image, VIDEO)


def ids(words: Any, **names: str) -> dict[str, int]:
    """Ids of tokens by the names that a configuration gives them."""
    return {name: words.convert_tokens_to_ids(token) for name, token in names.items()}


def text(words: Any, **more: Any) -> dict[str, Any]:
    """Configuration of a text decoder of two layers."""
    return {
        "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "num_key_value_heads": 2, "head_dim": HEAD, "vocab_size": len(words) + 8, "max_position_embeddings": 2048,
        "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


def multimodal_rope(**more: Any) -> dict[str, Any]:
    """Positions of text, height and width, as the Qwen and GLM families count them."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], **more}}


def tower(kind: str, side: int = 28, patch: int = 14, **more: Any) -> dict[str, Any]:
    """Configuration of an image tower of two layers."""
    return {
        "model_type": kind, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": side, "patch_size": patch, **more,
    }  # fmt: skip


def square(side: int) -> dict[str, int]:
    """Height and width of a square image."""
    return {"height": side, "width": side}


def model(parts: Parts, seed: int = 0) -> Any:
    """The model in eval mode, with weights of a scale at which image and words matter and captions are neither fixed nor noise."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, parts.kind)(parts.config)
        tied = made.get_output_embeddings().weight is made.get_input_embeddings().weight
        for name, weight in made.named_parameters():
            if weight.ndim > 1:
                table = "embed_tokens" in name or "lm_head" in name or "position" in name
                scale = 0.08 if tied else 0.2  # with one table, a word would be followed by itself
                torch.nn.init.normal_(weight, 0, scale if table else 0.8 / weight[0].numel() ** 0.5)
    words = parts.processor.tokenizer
    made.generation_config.eos_token_id = [words.eos_token_id, *parts.ends]
    made.generation_config.pad_token_id = words.pad_token_id
    return made.eval()
