"""Tiny checkpoints of families that cut pictures into tiles in a way of their own."""

from __future__ import annotations

from typing import Any

from benchmarks.breadth.tiny.parts import IMAGE, VIDEO, WIDTH, Parts, ids, square, template, text, tokenizer, tower

ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
IDEFICS = ["<fake_token_around_image>", IMAGE, "<end_of_utterance>", "<global-img>", VIDEO, *ROWS]
GRANITE: dict[str, Any] = {
    "logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.0625,
}  # fmt: skip


def idefics3() -> Parts:
    """Idefics3; its template writes the begin token that its tokenizer would add."""
    import transformers

    words = tokenizer(IDEFICS, begin=True)
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}), words, image_seq_len=4,
        chat_template=template(begin=True),
    )  # fmt: skip
    return Parts("Idefics3ForConditionalGeneration", _idefics("Idefics3", words), processor)


def _idefics(kind: str, words: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}Config")(
        vision_config=tower(f"{kind.lower()}_vision", patch=7), text_config=text(words, model_type="llama"), scale_factor=2,
        tie_word_embeddings=False, pad_token_id=words.pad_token_id, **ids(words, image_token_id=IMAGE),
    )  # fmt: skip


def smolvlm() -> Parts:
    """SmolVLM2."""
    import transformers

    roles = {"fake_image_token": IDEFICS[0], "image_token": IMAGE, "end_of_utterance_token": IDEFICS[2], "video_token": VIDEO}
    words = tokenizer(IDEFICS, {**roles, "global_image_token": "<global-img>"})
    sizes: dict[str, Any] = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    video: dict[str, Any] = {"size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}}
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**sizes), words, transformers.SmolVLMVideoProcessor(**video), image_seq_len=4,
        chat_template=template(),
    )  # fmt: skip
    return Parts("SmolVLMForConditionalGeneration", _idefics("SmolVLM", words), processor)


def lfm2_vl() -> Parts:
    """LFM2-VL: tiles of different numbers of patches, and short convolutions in the decoder."""
    import transformers

    roles = {"image_token": IMAGE, "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    roles["image_thumbnail_token"] = "<|img_thumbnail|>"
    marks = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)]
    words = tokenizer([*roles.values(), *marks], roles, begin=True)
    processor = transformers.Lfm2VlProcessor(
        transformers.Lfm2VlImageProcessor(
            tile_size=32, encoder_patch_size=4, min_image_tokens=4, max_image_tokens=16, max_tiles=4, min_tiles=2, size=square(32)
        ),
        words,
        chat_template=template(begin=True),
    )
    decoder = text(
        words, model_type="lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8, block_auto_adjust_ff_dim=False,
        conv_L_cache=3,
    )  # fmt: skip
    decoder.pop("head_dim")
    vision = {
        "model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "patch_size": 4, "num_patches": 64, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.Lfm2VlConfig(
        text_config=decoder, vision_config=vision, projector_hidden_size=64, tie_word_embeddings=True,
        **ids(words, image_token_id=IMAGE),
    )  # fmt: skip
    return Parts("Lfm2VlForConditionalGeneration", config, processor)


def granite_docling() -> Parts:
    """Granite-Docling: scaled logits, features of deep layers, tiles."""
    import transformers

    words = tokenizer(IDEFICS, {"image_token": IMAGE})
    processor = transformers.GraniteDoclingProcessor(
        transformers.GraniteDoclingImageProcessor(size=square(28), max_patches=4), words, image_seq_len=4, chat_template=template()
    )
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 7,
        "scale_factor": 2, "out_hidden_size": WIDTH, "deepstack_visual_indexes": [0], "use_fine_route": False,
    }  # fmt: skip
    decoder = text(words, **GRANITE)
    decoder.pop("head_dim")
    config = transformers.GraniteDoclingConfig(
        text_config=decoder, vision_config=vision, tie_word_embeddings=False, pad_token_id=words.pad_token_id,
        **ids(words, image_token_id=IMAGE),
    )  # fmt: skip
    return Parts("GraniteDoclingForConditionalGeneration", config, processor)


def granite4_vision() -> Parts:
    """Granite 4 Vision: scaled logits, features put in behind several layers, tiles."""
    import transformers

    words, pinpoints = tokenizer([IMAGE]), [[56, 56], [56, 112], [112, 56]]
    processor = transformers.Granite4VisionProcessor(
        transformers.LlavaNextImageProcessor(size=square(56), crop_size=square(56), image_grid_pinpoints=pinpoints), words,
        patch_size=14, vision_feature_select_strategy="full", chat_template=template(), image_token=IMAGE, downsample_rate="1/2",
    )  # fmt: skip
    vision = tower("siglip_vision_model", side=56, patch=14, vision_use_head=False) | {"hidden_size": 64}
    decoder = text(words, **{**GRANITE, "num_hidden_layers": 6})
    decoder.pop("head_dim")
    config = transformers.Granite4VisionConfig(
        text_config=decoder, vision_config=vision, image_grid_pinpoints=pinpoints, downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0], [-1, 1]], spatial_target_layers=[2, 3, 4, 5], vision_feature_select_strategy="full",
        projector_dropout=0.1, tie_word_embeddings=False, **ids(words, image_token_index=IMAGE),
    )  # fmt: skip
    return Parts("Granite4VisionForConditionalGeneration", config, processor)


def molmo2() -> Parts:
    """Molmo2: patches of several crops pooled by a list of their numbers."""
    import transformers

    marks = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>", "<im_low>"]
    words = tokenizer(["<|image|>", "<|video|>", *marks], {"image_token": "<|image|>", "video_token": "<|video|>"})
    sizes: dict[str, Any] = {"size": square(28), "patch_size": 7, "max_crops": 4, "overlap_margins": [1, 1], "pooling_size": [2, 2]}
    processor = transformers.Molmo2Processor(
        transformers.Molmo2ImageProcessor(**sizes), transformers.Molmo2VideoProcessor(size=square(28), patch_size=7), words,
        chat_template=template("<|image|>", begin=True),
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 16, "image_size": [28, 28], "patch_size": 7,
    }  # fmt: skip
    adapter = {
        "vision_feature_layer": [1, 0], "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 64, "text_hidden_size": WIDTH,
    }  # fmt: skip
    names = {
        "image_start_token_id": "<im_start>", "low_res_image_start_token_id": "<low_res_im_start>", "image_end_token_id": "<im_end>",
        "image_patch_id": "<im_patch>", "frame_start_token_id": "<frame_start>", "frame_end_token_id": "<frame_end>",
    }  # fmt: skip
    decoder = text(words, additional_vocab_size=8) | {"vocab_size": len(words)}
    config = transformers.Molmo2Config(
        vision_config=vision, adapter_config=adapter, text_config=decoder, tie_word_embeddings=False, **ids(words, **names)
    )
    return Parts("Molmo2ForConditionalGeneration", config, processor)


def llama4() -> Parts:
    """Llama 4: attention in chunks, experts, and no single module for all but the head."""
    import transformers

    names = ["image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator"]
    words = tokenizer([f"<|{name}|>" for name in names], begin=True)
    processor = transformers.Llama4Processor(
        transformers.Llama4ImageProcessor(size=square(28), max_patches=4), words, patch_size=7,
        chat_template=template("<|image|>", begin=True),
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 7,
        "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    decoder = text(
        words, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2,
        attention_chunk_size=16, no_rope_layers=[1, 0],
    )  # fmt: skip
    config = transformers.Llama4Config(
        vision_config=vision, text_config=decoder, tie_word_embeddings=False,
        **ids(words, image_token_index="<|patch|>", boi_token_index="<|image_start|>", eoi_token_index="<|image_end|>"),
    )  # fmt: skip
    return Parts("Llama4ForConditionalGeneration", config, processor)


def mllama() -> Parts:
    """Llama 3.2 Vision, whose text looks at images through layers of cross-attention."""
    import transformers

    words = tokenizer(["<|image|>", "<|python_tag|>"], {"image_token": "<|image|>"}, begin=True)
    processor = transformers.MllamaProcessor(
        transformers.MllamaImageProcessor(size=square(28), max_image_tiles=4), words,
        chat_template=template("<|image|>", begin=True),
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "image_size": 28, "patch_size": 7, "vision_output_dim": 64, "intermediate_layers_indices": [0],
    }  # fmt: skip
    decoder = text(words, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    decoder.pop("head_dim")
    config = transformers.MllamaConfig(vision_config=vision, text_config=decoder, **ids(words, image_token_index="<|image|>"))
    return Parts("MllamaForConditionalGeneration", config, processor)
