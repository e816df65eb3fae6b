"""Tiny checkpoints of families with an image tower of one size, or of any, before a common text decoder: Llava and its relatives."""

from __future__ import annotations

from typing import Any

from benchmarks.breadth.tiny.parts import IMAGE, MOMENTS, VIDEO, Parts, ids, square, template, text, tokenizer, tower

PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56]]
CLIP = {"projection_dim": 32}


def llava() -> Parts:
    """Llava 1.5."""
    import transformers

    words = tokenizer([IMAGE, VIDEO], begin=True)
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=square(28), crop_size=square(28)), words, patch_size=14,
        vision_feature_select_strategy="default", chat_template=template(), image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=tower("clip_vision_model", **CLIP), text_config=text(words, model_type="llama"), tie_word_embeddings=False,
        **ids(words, image_token_index=IMAGE),
    )  # fmt: skip
    return Parts("LlavaForConditionalGeneration", config, processor)


def llava_next() -> Parts:
    """Llava-Next: tiles, padded to the same number for all images."""
    import transformers

    words = tokenizer([IMAGE, VIDEO])
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(size=square(28), crop_size=square(28), image_grid_pinpoints=PINPOINTS), words,
        patch_size=14, vision_feature_select_strategy="default", chat_template=template(), image_token=IMAGE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    config = transformers.LlavaNextConfig(
        vision_config=tower("clip_vision_model", **CLIP), text_config=text(words, model_type="mistral", sliding_window=None),
        image_grid_pinpoints=PINPOINTS, tie_word_embeddings=False, **ids(words, image_token_index=IMAGE),
    )  # fmt: skip
    return Parts("LlavaNextForConditionalGeneration", config, processor)


def llava_onevision() -> Parts:
    """Llava-OneVision."""
    import transformers

    words = tokenizer([IMAGE, VIDEO])
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=square(28), image_grid_pinpoints=PINPOINTS), words,
        transformers.LlavaOnevisionVideoProcessor(size=square(28)), num_image_tokens=4, vision_feature_select_strategy="full",
        chat_template=template(),
    )  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        vision_config=tower("siglip_vision_model", vision_use_head=False), text_config=text(words, model_type="qwen2"),
        image_grid_pinpoints=PINPOINTS, tie_word_embeddings=False, **ids(words, image_token_index=IMAGE, video_token_index=VIDEO),
    )  # fmt: skip
    return Parts("LlavaOnevisionForConditionalGeneration", config, processor)


def internvl() -> Parts:
    """InternVL3, with tiles."""
    import transformers

    roles = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": VIDEO}
    words = tokenizer([*roles.values()], roles)
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=square(28), crop_to_patches=True, max_patches=4), words,
        transformers.InternVLVideoProcessor(size=square(28)), image_seq_length=4, chat_template=template("<IMG_CONTEXT>"),
    )  # fmt: skip
    vision = tower("internvl_vision", side=28, patch=7)
    config = transformers.InternVLConfig(
        text_config=text(words, model_type="qwen2"), vision_config={**vision, "image_size": [28, 28], "patch_size": [7, 7]},
        image_seq_length=4, tie_word_embeddings=False, **ids(words, image_token_id="<IMG_CONTEXT>"),
    )  # fmt: skip
    return Parts("InternVLForConditionalGeneration", config, processor)


def fast_vlm() -> Parts:
    """FastVLM: a convolutional tower of timm."""
    import transformers

    words = tokenizer([IMAGE, VIDEO])
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=square(64), crop_size=square(64)), words, patch_size=32,
        vision_feature_select_strategy="full", chat_template=template(), image_token=IMAGE,
    )  # fmt: skip
    vision = {
        "model_type": "timm_wrapper", "architecture": "fastvit_mci2", "do_pooling": True, "num_classes": 0, "hidden_size": 128,
        "model_args": {"inference_mode": True, "layers": [1, 1, 1, 1], "embed_dims": [8, 16, 32, 64]},
    }  # fmt: skip
    config = transformers.FastVlmConfig(
        vision_config=vision, text_config=text(words, model_type="qwen2"), tie_word_embeddings=False,
        **ids(words, image_token_index=IMAGE),
    )  # fmt: skip
    return Parts("FastVlmForConditionalGeneration", config, processor)


def deepseek_vl() -> Parts:
    """DeepSeek-VL."""
    import transformers

    words = tokenizer(["<image_placeholder>"], {"image_token": "<image_placeholder>"})
    processor = transformers.DeepseekVLProcessor(
        transformers.DeepseekVLImageProcessor(size=square(28), min_size=14), words, num_image_tokens=4,
        chat_template=template("<image_placeholder>"),
    )  # fmt: skip
    config = transformers.DeepseekVLConfig(
        vision_config=tower("siglip_vision_model", vision_use_head=False), text_config=text(words, model_type="llama"),
        tie_word_embeddings=False, **ids(words, image_token_id="<image_placeholder>"),
    )  # fmt: skip
    return Parts("DeepseekVLForConditionalGeneration", config, processor)


def _pixtral(merge: int) -> tuple[Any, Any, dict[str, Any]]:
    import transformers

    marks = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    words = tokenizer(marks, begin=True)
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=square(8 * merge)), words, patch_size=8,
        spatial_merge_size=merge, chat_template=template("[IMG]", begin=True),
    )  # fmt: skip
    return words, processor, tower("pixtral", side=64, patch=8, head_dim=16)


def pixtral() -> Parts:
    """Pixtral in the layout of Llava; its template writes the begin token that its tokenizer would add."""
    import transformers

    words, processor, vision = _pixtral(1)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text(words, model_type="mistral", sliding_window=None), vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=False, **ids(words, image_token_index="[IMG]"),
    )  # fmt: skip
    return Parts("LlavaForConditionalGeneration", config, processor)


def mistral3() -> Parts:
    """Mistral Small 3.1; its template writes the begin token that its tokenizer would add."""
    import transformers

    words, processor, vision = _pixtral(2)
    config = transformers.Mistral3Config(
        vision_config=vision, text_config=text(words, model_type="mistral", sliding_window=None), tie_word_embeddings=False,
        **ids(words, image_token_index="[IMG]"),
    )  # fmt: skip
    return Parts("Mistral3ForConditionalGeneration", config, processor)


def _cohere(words: Any) -> dict[str, Any]:
    layers = ["sliding_attention", "full_attention"]
    decoder = text(words, model_type="cohere2", sliding_window=6, layer_types=layers, logit_scale=0.25)
    decoder.pop("head_dim")
    return decoder


def aya_vision() -> Parts:
    """Aya Vision 8B: tiles, and windows of attention in the decoder of Cohere."""
    import transformers

    marks = [IMAGE, "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"]
    words = tokenizer([*marks, *(f"TILE_{number}" for number in range(1, 6))], begin=True)
    processor = transformers.AyaVisionProcessor(
        transformers.GotOcr2ImageProcessor(size=square(28), crop_to_patches=True, max_patches=4, **MOMENTS), words, patch_size=7,
        img_size=28, downsample_factor=2, chat_template=template(begin=True),
    )  # fmt: skip
    config = transformers.AyaVisionConfig(
        vision_config=tower("siglip_vision_model", patch=7, vision_use_head=False), text_config=_cohere(words), downsample_factor=2,
        tie_word_embeddings=True, **ids(words, image_token_index="<|IMG_PATCH|>"),
    )  # fmt: skip
    return Parts("AyaVisionForConditionalGeneration", config, processor)


def command_a() -> Parts:
    """Command A Vision: tiles, and windows of attention."""
    import transformers

    roles = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>"}
    roles["img_line_break_token"] = "<|IMG_LINE_BREAK|>"
    words = tokenizer([*roles.values()], roles, begin=True)
    processor = transformers.Cohere2VisionProcessor(
        transformers.Cohere2VisionImageProcessor(
            size=square(32), patch_size=4, downsample_factor=2, max_patches=4, crop_to_patches=True, **MOMENTS
        ),
        words,
        chat_template=template("<|IMG_PATCH|>", begin=True),
    )
    config = transformers.Cohere2VisionConfig(
        vision_config=tower("siglip_vision_model", side=32, patch=4, vision_use_head=False), text_config=_cohere(words),
        downsample_factor=2, alignment_intermediate_size=64, tie_word_embeddings=True, **ids(words, image_token_id="<|IMG_PATCH|>"),
    )  # fmt: skip
    return Parts("Cohere2VisionForConditionalGeneration", config, processor)


def ovis2() -> Parts:
    """Ovis2: tiles with indicator tokens, whose embeddings come from a table of the tower's."""
    import transformers

    marks = [f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END")]
    words = tokenizer([IMAGE, "<IMG_ATOM>", *marks])
    processor = transformers.Ovis2Processor(
        transformers.Ovis2ImageProcessor(size=square(28), crop_to_patches=True, max_patches=4), words, chat_template=template(),
        image_seq_length=4,
    )  # fmt: skip
    vision = tower("ovis2_vision", patch=7, vocab_size=48, hidden_stride=2, num_visual_indicator_tokens=5)
    config = transformers.Ovis2Config(
        vision_config=vision, text_config=text(words, model_type="qwen2"), hidden_size=64, vocab_size=len(words) + 8,
        visual_indicator_token_ids=words.convert_tokens_to_ids(marks), tie_word_embeddings=False,
        **ids(words, image_token_id="<IMG_ATOM>"),
    )  # fmt: skip
    return Parts("Ovis2ForConditionalGeneration", config, processor)
