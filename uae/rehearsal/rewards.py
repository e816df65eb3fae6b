"""Tiny models with random weights that rewards ask: preference, text in pictures, perceptual distance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uae.rehearsal.encoders import SIZES, spread, write_clip
from uae.rehearsal.language_models import END, PAD, subwords, tokenizer

OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {},
}


def write_hpsv2(folder: Path) -> None:
    """HPSv2: a state dict of open_clip. The released one is of ViT-H-14; a file beside this one says its smaller sizes."""
    import open_clip
    import torch

    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    network = spread(open_clip.create_model(f"local-dir:{folder}", load_weights=False), seed=6).half()
    torch.save({"state_dict": network.state_dict()}, folder / "HPS_v2_compressed.pt")


def write_backbones(folder: Path) -> None:
    """The features of AlexNet, at their real size, in the file that torchvision publishes; without its classifier."""
    import torch
    import torchvision

    features = torchvision.models.alexnet().features
    state = {f"features.{name}": weight.half() for name, weight in features.state_dict().items()}
    torch.save(state, folder / "alexnet-owt-7be5be79.pth")


def write_trocr(folder: Path) -> None:
    """TrOCR: an image encoder and a decoder of text, and a tokenizer of bytes."""
    from transformers import (
        GenerationConfig,
        RobertaTokenizer,
        TrOCRConfig,
        TrOCRForCausalLM,
        TrOCRProcessor,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    vocab, merges = subwords()
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {mark: number for number, mark in enumerate(marks)} | {piece: n + len(marks) for piece, n in vocab.items()}
    reader = RobertaTokenizer(vocab=vocab, merges=merges)
    side = {"height": 32, "width": 32}
    begin, pad, end = (marks.index(mark) for mark in ("<s>", "<pad>", "</s>"))
    decoder = TrOCRConfig(
        vocab_size=len(reader), d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64,
        cross_attention_hidden_size=32, max_position_embeddings=128, bos_token_id=begin, pad_token_id=pad, eos_token_id=end,
        decoder_start_token_id=end,
    )  # fmt: skip
    encoder = ViTModel(ViTConfig(image_size=32, patch_size=16, **SIZES), add_pooling_layer=False)  # as released
    network = VisionEncoderDecoderModel(encoder=encoder, decoder=TrOCRForCausalLM(decoder))
    ids: dict[str, Any] = {"decoder_start_token_id": end, "pad_token_id": pad, "eos_token_id": end}
    for name, value in ids.items():
        setattr(network.config, name, value)
    # as released: beams, and no repetition
    network.generation_config = GenerationConfig(num_beams=4, no_repeat_ngram_size=3, early_stopping=True, max_length=64, **ids)
    _readable(network, seed=8).save_pretrained(folder)
    pixels = ViTImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    TrOCRProcessor(image_processor=pixels, tokenizer=reader).save_pretrained(folder)


def write_got_ocr(folder: Path) -> None:
    """GOT-OCR 2: a picture is 256 tokens of a Qwen2 decoder. It has no chat template, and its processor asks the question."""
    from transformers import (
        GenerationConfig,
        GotOcr2Config,
        GotOcr2ForConditionalGeneration,
        GotOcr2ImageProcessor,
        GotOcr2Processor,
    )

    roles = {"image_token": "<imgpad>", "img_start_token": "<img>", "img_end_token": "</img>"}
    reader = tokenizer([PAD, "<|im_start|>", END, *roles.values()])
    pixels = GotOcr2ImageProcessor(size={"height": 64, "width": 64})
    vision = {
        "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 1, "mlp_dim": 32, "window_size": 8, "global_attn_indexes": [],
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": len(reader), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": reader.pad_token_id,
        "eos_token_id": reader.eos_token_id,
    }  # fmt: skip
    config = GotOcr2Config(vision_config=vision, text_config=text, image_token_index=reader.convert_tokens_to_ids("<imgpad>"))
    network = _readable(GotOcr2ForConditionalGeneration(config), seed=9)
    network.generation_config = GenerationConfig(eos_token_id=reader.eos_token_id, pad_token_id=reader.pad_token_id)
    network.save_pretrained(folder)
    GotOcr2Processor(image_processor=pixels, tokenizer=reader).save_pretrained(folder)


def _readable(network: Any, seed: int) -> Any:
    """Weights of a scale at which different pictures are read as different texts."""
    import torch

    noise = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 1.5 * weight[0].numel() ** -0.5, generator=noise)
    return network.eval()


REWARDS: dict[str, Callable[[Path], None]] = {
    "yuvalkirstain/PickScore_v1": lambda folder: write_clip(folder, seed=5),
    "xswu/HPSv2": write_hpsv2,
    "microsoft/trocr-base-printed": write_trocr,
    "stepfun-ai/GOT-OCR-2.0-hf": write_got_ocr,
    "torchvision": write_backbones,
}
