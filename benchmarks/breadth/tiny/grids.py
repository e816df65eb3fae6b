"""Tiny checkpoints of families whose towers read images of any size as patches: Qwen, GLM, Kimi, MiniCPM, HyperCLOVA X."""

from __future__ import annotations

from typing import Any

from benchmarks.breadth.tiny.parts import MOMENTS, VIDEO, WIDTH, Parts, ids, multimodal_rope, template, text, tokenizer

SIDES: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
SIZE = {"shortest_edge": 24 * 24, "longest_edge": 24 * 48}
QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
BETWEEN = "<|vision_start|><|image_pad|><|vision_end|>"
GLM = ["<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|video|>"]
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": WIDTH,
}  # fmt: skip


def qwen(version: str, **text_more: Any) -> Parts:
    """The Qwen-VL generations; ``version`` is the prefix of their classes in transformers."""
    import transformers

    words = tokenizer(QWEN)
    processors = {"Qwen2": "Qwen2VLProcessor", "Qwen2_5_": "Qwen2_5_VLProcessor"}
    processor_kind = getattr(transformers, processors.get(version, "Qwen3VLProcessor"))
    video = transformers.Qwen2VLVideoProcessor if version in processors else transformers.Qwen3VLVideoProcessor
    processor = processor_kind(
        transformers.Qwen2VLImageProcessor(size=SIZE, **SIDES, **MOMENTS), words, video(**SIDES), template(BETWEEN)
    )
    vision = {**VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    if version == "Qwen2":
        vision = {
            "hidden_size": WIDTH, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
    if version == "Qwen2_5_":
        vision = {**VISION, "window_size": 32, "fullatt_block_indexes": [1]}
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    rope = multimodal_rope(**({"partial_rotary_factor": 1.0} if version.startswith("Qwen3_5") else {}))
    config = getattr(transformers, _named(version, "Config"))(
        text_config=text(words, **rope, **text_more), vision_config=vision, tie_word_embeddings=False, **ids(words, **names)
    )
    return Parts(_named(version, "ForConditionalGeneration"), config, processor)


def _named(version: str, what: str) -> str:
    generation, _, mixture = version.partition("Moe")
    middle = "" if generation == "Qwen3_5" else "VL"
    return f"{generation}{middle}{'Moe' if 'Moe' in version else ''}{what}"


def qwen3_5() -> Parts:
    """Every second layer is linear attention."""
    return qwen(
        "Qwen3_5", full_attention_interval=2, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
        linear_num_value_heads=4,
    )  # fmt: skip


def qwen3_vl_moe() -> Parts:
    """Its experts are one weight for all, which no adapter reaches."""
    return qwen("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)


def glm4v() -> Parts:
    """GLM-4.1V."""
    return _glm("Glm4v")


def glm46v() -> Parts:
    """GLM-4.6V."""
    return _glm("Glm46V")


def _glm(kind: str) -> Parts:
    import transformers

    words = tokenizer(GLM, {"image_token": "<|image|>", "video_token": "<|video|>"})
    sizes = {**SIDES, "size": {"shortest_edge": 2 * 24 * 24, "longest_edge": 2 * 24 * 48}}
    processor = getattr(transformers, f"{kind}Processor")(
        getattr(transformers, f"{kind}ImageProcessor")(**sizes), words, getattr(transformers, f"{kind}VideoProcessor")(**sizes),
        chat_template=template("<|begin_of_image|><|image|><|end_of_image|>"),
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": WIDTH, "image_size": 24,
    }  # fmt: skip
    names = {
        "image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>", "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        text_config=text(words, **multimodal_rope(partial_rotary_factor=1.0)), vision_config=vision, tie_word_embeddings=False,
        **ids(words, **names),
    )  # fmt: skip
    return Parts(f"{kind}ForConditionalGeneration", config, processor)


def kimi() -> Parts:
    """Kimi-K2.5: the text decoder of DeepSeek-V3, with keys and values in a smaller space, and experts."""
    import transformers

    marks = ["<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>"]
    words = tokenizer(marks, {"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"})
    processor = transformers.Kimi_K25Processor(
        transformers.Kimi_K25ImageProcessor(patch_size=4, merge_size=2, size={"max_height": 48, "max_width": 48}), words,
        transformers.Kimi_K25VideoProcessor(patch_size=4, merge_size=2),
        chat_template=template("<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"),
    )  # fmt: skip
    decoder = text(
        words, model_type="deepseek_v3", q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32,
        first_k_dense_replace=1, n_group=1, topk_group=1,
    )  # fmt: skip
    decoder.pop("head_dim")
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        "pos_emb_height": 8, "pos_emb_width": 8, "merge_kernel_size": [2, 2],
    }  # fmt: skip
    names = {"image_token_id": "<|media_pad|>", "video_token_id": "<|kimi_k25_video_placeholder|>"}
    names |= {"vision_start_token_id": "<|media_begin|>", "vision_end_token_id": "<|media_end|>"}
    config = transformers.Kimi_K25Config(
        text_config=decoder, vision_config=vision, projection_hidden_size=32, tie_word_embeddings=False, **ids(words, **names)
    )
    return Parts("Kimi_K25ForConditionalGeneration", config, processor)


def minicpm() -> Parts:
    """MiniCPM-V 4.6: the patches of all images in one long row, and linear attention."""
    import transformers

    roles = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>", "image_end_token": "</image>",
        "slice_start_token": "<slice>", "slice_end_token": "</slice>", "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }  # fmt: skip
    words = tokenizer([*roles.values()], roles)
    sizes: dict[str, Any] = {"patch_size": 4, "scale_resolution": 32, "max_slice_nums": 4}
    processor = transformers.MiniCPMV4_6Processor(
        transformers.MiniCPMV4_6ImageProcessor(**sizes), transformers.MiniCPMV4_6VideoProcessor(**sizes), words,
        chat_template=template("<|image_pad|>"),
    )  # fmt: skip
    decoder = text(
        words, model_type="qwen3_5_text", full_attention_interval=2, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=4, **multimodal_rope(partial_rotary_factor=1.0),
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        "image_size": 32,
    }  # fmt: skip
    config = transformers.MiniCPMV4_6Config(
        text_config=decoder, vision_config=vision, insert_layer_id=0, image_size=32, tie_word_embeddings=False,
        **ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )  # fmt: skip
    return Parts("MiniCPMV4_6ForConditionalGeneration", config, processor)


def hyperclova() -> Parts:
    """HyperCLOVA X Vision v2, whose logits are scaled."""
    import transformers

    words = tokenizer([*QWEN, VIDEO], {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    processor = transformers.HyperCLOVAXVisionV2Processor(
        transformers.Qwen2VLImageProcessor(size=SIZE, **SIDES, **MOMENTS), words, transformers.Qwen2VLVideoProcessor(**SIDES),
        chat_template=template(BETWEEN),
    )  # fmt: skip
    decoder = text(words, model_type="hyperclovax", logits_scaling=0.25, residual_multiplier=0.7, embedding_multiplier=2.0)
    vision = {**VISION, "model_type": "qwen2_5_vl_vision", "window_size": 32, "fullatt_block_indexes": [1]}
    config = transformers.HyperCLOVAXVisionV2Config(
        text_config=decoder, vision_config=vision, tie_word_embeddings=False,
        **ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )  # fmt: skip
    return Parts("HyperCLOVAXVisionV2ForConditionalGeneration", config, processor)
