"""Tokenizers with one token per character (or byte), of the classes the published pipelines use."""

from __future__ import annotations

from typing import Any

_PRINTABLE = [chr(code) for code in range(33, 127)]
_SPACE = "\u2581"  # the space of SentencePiece
_TEMPLATE = "the image by detailing color shape size texture quantity text spatial relationships of objects and background"


def clip_tokenizer() -> Any:
    """CLIP's tokenizer; it reads 77 tokens."""
    from transformers import CLIPTokenizer

    letters = _bytes()
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab=_numbered(pieces), merges=[], model_max_length=77)


def t5_tokenizer(max_length: int) -> Any:
    """T5's tokenizer; it reads ``max_length`` tokens, the end token included."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (_SPACE, -2.0), *((letter, -3.0) for letter in _PRINTABLE)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def gemma_tokenizer() -> Any:
    """Gemma's tokenizer; it adds a begin token."""
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *_byte_pieces(), _SPACE, "\n", *_PRINTABLE]
    return GemmaTokenizer(vocab=_numbered(pieces), merges=[], add_bos_token=True)


def llama_tokenizer() -> Any:
    """Llama's tokenizer, with one token per character, spaces included."""
    from transformers import LlamaTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *_byte_pieces(), _SPACE, "\n", *_PRINTABLE]
    return LlamaTokenizerFast(vocab=_numbered(pieces), merges=[])


def qwen_tokenizer() -> Any:
    """Qwen2's tokenizer, with tokens for bytes, the chat format and the words of Qwen-Image's template.

    The template must have 34 tokens before the caption, because the pipeline drops the first 34 states.
    """
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab=_numbered([*_bytes(), "<|endoftext|>"]), merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["system", "Describe", "user", "assistant"])
    tokenizer.add_tokens([" " + word for word in _TEMPLATE.split()])
    return tokenizer


def _bytes() -> list[str]:
    """The 256 characters that stand for bytes in byte-level tokenizers."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _byte_pieces() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(pieces)}
