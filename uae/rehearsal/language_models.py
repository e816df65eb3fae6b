"""Tiny vision-language models with random weights, in the layouts (and under the classes) of the released ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from uae.rehearsal.encoders import IMAGENET, Moments

WIDTH = 64  # hidden size of all language models here; connectors have width / 64 heads
END, PAD = "<|im_end|>", "<|endoftext|>"
QWEN = [
    PAD, "<|im_start|>", END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
INTERN = [PAD, "<|im_start|>", END, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
LLAVA = [PAD, "<|im_start|>", END, "<image>", "<video>"]
SENTENCES = [
    "The image shows a large red circle on the left and a small blue square on the right of a gray background.",
    "A photograph of a wooden table with a green vase, three yellow flowers and an open book in front of a window.",
    "In the foreground, two people are standing next to a white car; behind them there is a street with tall buildings.",
    "system: You are a helpful assistant. user: Describe the picture in detail. assistant: This is a picture of",
    'The sign above the door says "OPEN", and the text on the shirt reads "No. 1".',
    "At the top there is a blue sky with white clouds, at the bottom a path leads through the green grass to a house.",
    "It has a soft light, warm colors, and a calm mood. The cat, which is black, looks at the camera from the center.",
]


def subwords(vocabulary: int = 440, **settings: Any) -> tuple[dict[str, int], Any]:
    """Learn byte-level byte-pair encoding from a few sentences. It can encode any text.

    Args:
        vocabulary: Number of entries of the vocabulary.
        settings: Further arguments of both the model and the trainer of the library tokenizers.

    Returns:
        The vocabulary and the merges, a list of pairs. Its type is Any, because transformers declares merges as a list of
        strings and takes pairs.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(**settings))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        SENTENCES * 2,
        trainers.BpeTrainer(vocab_size=vocabulary, min_frequency=2, initial_alphabet=alphabet, show_progress=False, **settings),
    )
    learned = json.loads(learner.to_str())["model"]
    return learned["vocab"], [tuple(pair) for pair in learned["merges"]]


def tokenizer(specials: list[str], roles: dict[str, str] | None = None) -> Any:
    """A Qwen2 tokenizer.

    Args:
        specials: Special tokens.
        roles: Attribute of the tokenizer to special token; processors look tokens up by attribute.
    """
    from transformers import Qwen2Tokenizer

    vocab, merges = subwords()
    made = Qwen2Tokenizer(
        vocab, merges, eos_token=END, pad_token=PAD, unk_token=PAD, model_max_length=32768, padding_side="left",
        **({"extra_special_tokens": roles} if roles else {}),
    )  # fmt: skip
    made.add_tokens(specials, special_tokens=True)
    return made


def chat_template(image: str, video: str, system: str | None = None) -> str:
    """A chat template in ChatML that accepts any role.

    Args:
        image: Text that stands for an image.
        video: Text that stands for a video.
        system: Default system message, for conversations without one; None for no default.
    """
    lines = ["{%- for message in messages -%}"]
    if system:
        lines += [
            "{%- if loop.first and message.role != 'system' -%}",
            "{{- '<|im_start|>system\\n" + system + "<|im_end|>\\n' -}}",
            "{%- endif -%}",
        ]
    lines += [
        "{{- '<|im_start|>' + message.role + '\\n' -}}",
        "{%- if message.content is string -%}{{- message.content -}}",
        "{%- else -%}{%- for part in message.content -%}",
        "{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}{{- '" + image + "' -}}",
        "{%- elif part.type == 'video' or 'video' in part -%}{{- '" + video + "' -}}",
        "{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}",
        "{%- endfor -%}{%- endif -%}",
        "{{- '<|im_end|>\\n' -}}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
    ]
    return "\n".join(lines)


def generation_settings(tokenizer: Any) -> Any:
    """Generation settings as in the released models. They reshape the distribution, so captioners must ignore them."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], repetition_penalty=1.05, temperature=0.1, top_k=1, top_p=0.8,
    )  # fmt: skip


def randomise(model: Any, tokenizer: Any, seed: int) -> Any:
    """Weights of a scale at which picture and text matter, and captions look like text and end now and then.

    The first feature of every token embedding is a constant that no layer touches, so in the output head the same feature
    is a bias for or against a token: against bytes that are no text, in favour of the end.
    """
    import torch

    noise = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            scale = 0.2 if "embed" in name or "lm_head" in name else 1.2 * weight[0].numel() ** -0.5
            weight.data.normal_(0, scale, generator=noise)
    decoder = model.model.language_model
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight.data[0] = 0
        layer.mlp.down_proj.weight.data[0] = 0
        layer.input_layernorm.weight.data[0] = 0
        layer.post_attention_layernorm.weight.data[0] = 0
    decoder.norm.weight.data[0] = 8
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    spelled = [tokenizer.convert_tokens_to_string([token]) for token in tokens]
    readable = torch.tensor([text.strip("\n").isprintable() and "\N{REPLACEMENT CHARACTER}" not in text for text in spelled])
    readable[list(tokenizer.added_tokens_decoder)] = False
    bias_V = torch.where(readable, 2.0, 1.0)
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    bias_V[ends] = 2.34
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.data[ends] *= 0.3  # ends are as likely after one text as after another
        table.weight.data[:, 0] = 1.0
        table.weight.data[: len(tokenizer), 0] = bias_V
    model.generation_config = generation_settings(tokenizer)
    return model.eval()


def qwen2_5_vl_processor(specials: list[str] = QWEN) -> Any:
    """The processor of Qwen2.5-VL with the released bounds on image areas; a token covers 28 x 28 pixels."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    sizes: dict[str, Any] = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    template = chat_template(_between("<|image_pad|>"), _between("<|video_pad|>"), "You are a helpful assistant.")
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 12845056}, **sizes),
        tokenizer=tokenizer(specials),
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=template,
    )


def qwen2_5_vl(tied: bool, seed: int = 0, specials: list[str] = QWEN) -> tuple[Any, Any]:
    """Qwen2.5-VL and its processor. The 3B model ties its token embeddings to its head, the 7B model does not."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    processor = qwen2_5_vl_processor(specials)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1], "out_hidden_size": WIDTH,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**_decoder(processor.tokenizer, tied), **_rope(sections=True)},
        vision_config=vision,
        tie_word_embeddings=tied,
        **_vision_tokens(processor.tokenizer),
    )
    return randomise(Qwen2_5_VLForConditionalGeneration(config), processor.tokenizer, seed), processor


def qwen3_vl() -> tuple[Any, Any]:
    """Qwen3-VL and its processor. A token covers 32 x 32 pixels, and there is no default system message."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    sizes: dict[str, Any] = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    moments: Moments = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size={"shortest_edge": 65536, "longest_edge": 16777216}, **sizes, **moments),
        tokenizer(QWEN),
        Qwen3VLVideoProcessor(**sizes),
        chat_template(_between("<|image_pad|>"), _between("<|video_pad|>")),
    )
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": WIDTH, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {**_decoder(processor.tokenizer, tied=True), **_rope(sections=True), "head_dim": 16}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_vision_tokens(processor.tokenizer))
    return randomise(Qwen3VLForConditionalGeneration(config), processor.tokenizer, seed=1), processor


def internvl() -> tuple[Any, Any]:
    """InternVL3 in the layout of transformers and its processor, with 4 tokens per tile instead of 256."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    roles = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    reader, side = tokenizer(INTERN, {**roles, "video_token": "<video>"}), {"height": 56, "width": 56}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=side, crop_to_patches=False, min_patches=1, max_patches=12, **IMAGENET),
        reader,
        InternVLVideoProcessor(size=side, **IMAGENET),
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>\n", "<video>\n"),
    )
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": [56, 56], "patch_size": [14, 14],
    }  # fmt: skip
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_decoder(reader, tied=False), **_rope()}, vision_config=vision,
        image_token_id=reader.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(InternVLForConditionalGeneration(config), reader, seed=2), processor


def llava_onevision() -> tuple[Any, Any]:
    """LLaVA-OneVision and its processor, with tiles of 28 x 28 pixels instead of 384 x 384."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    reader, side, pinpoints = tokenizer(LLAVA), {"height": 28, "width": 28}, [[28, 28], [28, 56], [56, 28], [56, 56]]
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=pinpoints),
        reader,
        LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>\n", "<video>\n"),
    )
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_decoder(reader, tied=True), **_rope()}, vision_config=vision,
        image_token_index=reader.convert_tokens_to_ids("<image>"), image_grid_pinpoints=pinpoints,
        video_token_index=reader.convert_tokens_to_ids("<video>"), tie_word_embeddings=True,
    )  # fmt: skip
    return randomise(LlavaOnevisionForConditionalGeneration(config), reader, seed=3), processor


def save(create: Callable[[], tuple[Any, Any]]) -> Callable[[Path], None]:
    """A function that writes a model and its processor into a folder, in bfloat16 as released."""

    def write(folder: Path) -> None:
        model, processor = create()
        model.bfloat16().save_pretrained(folder)
        processor.save_pretrained(folder)

    return write


def _decoder(tokenizer: Any, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 8, "max_position_embeddings": 4096, "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def _rope(sections: bool = False) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return {"rope_parameters": {**rope, **({"mrope_section": [4, 2, 2]} if sections else {})}}


class _VisionTokens(TypedDict):
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int


def _vision_tokens(tokenizer: Any) -> _VisionTokens:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def _between(token: str) -> str:
    return f"<|vision_start|>{token}<|vision_end|>"


LANGUAGE_MODELS: dict[str, Callable[[Path], None]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": save(lambda: qwen2_5_vl(tied=True)),
    "Qwen/Qwen2.5-VL-7B-Instruct": save(lambda: qwen2_5_vl(tied=False, seed=7)),
    "Qwen/Qwen3-VL-4B-Instruct": save(qwen3_vl),
    "OpenGVLab/InternVL3-1B-hf": save(internvl),
    "OpenGVLab/InternVL3-2B-hf": save(internvl),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": save(llava_onevision),
}
