"""Tiny checkpoints of the Gemma families: windows of attention, caps on logits, images that look at themselves in both directions."""

from __future__ import annotations

from typing import Any

from benchmarks.breadth.tiny.parts import IMAGE, MOMENTS, WIDTH, Parts, ids, square, template, text, tokenizer, tower

WINDOW = 6  # shorter than every prompt
LAYERS = ["sliding_attention", "full_attention"]
MARKS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
SOUND = {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}


def paligemma() -> Parts:
    """PaliGemma, with a chat template, which the released one lacks; a prompt looks at itself in both directions."""
    return _paligemma("gemma")


def paligemma2() -> Parts:
    """PaliGemma 2: caps on logits and on attention, windows of attention."""
    return _paligemma(
        "gemma2", sliding_window=WINDOW, layer_types=LAYERS, final_logit_softcapping=2.0, attn_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
    )  # fmt: skip


def _paligemma(kind: str, **more: Any) -> Parts:
    import transformers

    words = tokenizer([IMAGE], {"image_token": IMAGE})
    images = transformers.SiglipImageProcessor(size=square(28), **MOMENTS)
    images.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(images, words, chat_template=template())
    vision = tower("siglip_vision_model", vision_use_head=False)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text(words, model_type=kind, **more), projection_dim=WIDTH, hidden_size=WIDTH,
        tie_word_embeddings=True, **ids(words, image_token_index=IMAGE),
    )  # fmt: skip
    return Parts("PaliGemmaForConditionalGeneration", config, processor)


def gemma3() -> Parts:
    """Gemma 3, whose multimodal class leaves the cap of its configuration out; its template writes the begin token."""
    import transformers

    words = tokenizer([*MARKS.values()], MARKS, begin=True)
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=square(28), **MOMENTS), words,
        chat_template=template("<start_of_image>", begin=True), image_seq_length=4,
    )  # fmt: skip
    decoder = text(words, sliding_window=WINDOW, layer_types=LAYERS, query_pre_attn_scalar=16)
    names = {"image_token_index": "image_token", "boi_token_index": "boi_token", "eoi_token_index": "eoi_token"}
    config = transformers.Gemma3Config(
        vision_config=tower("siglip_vision_model", patch=7, vision_use_head=False), text_config=decoder, mm_tokens_per_image=4,
        tie_word_embeddings=True, **ids(words, **{name: MARKS[mark] for name, mark in names.items()}),
    )  # fmt: skip
    return Parts("Gemma3ForConditionalGeneration", config, processor)


def gemma4() -> Parts:
    """Gemma 4: a cap on logits, embeddings for every layer, layers that use keys and values of others, windows of attention."""
    import transformers

    roles = {**MARKS, **SOUND}
    words = tokenizer([*roles.values()], roles, begin=True)
    sizes: dict[str, Any] = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(), transformers.Gemma4ImageProcessor(**sizes), words,
        transformers.Gemma4VideoProcessor(**sizes), chat_template=template(MARKS["image_token"], begin=True), image_seq_length=70,
    )  # fmt: skip
    decoder = text(
        words, sliding_window=WINDOW, num_hidden_layers=4, layer_types=LAYERS * 2, final_logit_softcapping=2.0, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=len(words) + 8, global_head_dim=16,
        use_bidirectional_attention="vision", tie_word_embeddings=True,
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 64,
    }  # fmt: skip
    config = transformers.Gemma4Config(
        text_config=decoder, vision_config=vision, audio_config=None, tie_word_embeddings=True, **_gemma4_ids(processor)
    )
    return Parts("Gemma4ForConditionalGeneration", config, processor)


def _gemma4_ids(processor: Any) -> dict[str, int]:
    words = processor.tokenizer
    names = {f"{mark}_id": token for mark, token in {**MARKS, **SOUND}.items() if mark != "eoa_token"}
    return ids(words, **names, eoa_token_index=SOUND["eoa_token"], video_token_id=processor.video_token)


def gemma3n() -> Parts:
    """Gemma 3n: several streams of hidden states, a cap on logits, shared keys and values, a convolutional tower of timm."""
    import transformers

    roles = {**MARKS, **SOUND}
    words = tokenizer([*roles.values()], roles, begin=True)
    processor = transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(), transformers.SiglipImageProcessor(size=square(128), **MOMENTS), words,
        chat_template=template(MARKS["image_token"], begin=True), image_seq_length=256, audio_seq_length=4,
    )  # fmt: skip
    size = len(words) + 8
    decoder = text(
        words, sliding_window=WINDOW, num_hidden_layers=4, layer_types=LAYERS * 2, final_logit_softcapping=2.0, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=size, intermediate_size=[96] * 4, laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4, tie_word_embeddings=True,
    )  # fmt: skip
    vision = {"architecture": "mobilenetv5_300m_enc", "hidden_size": 2048, "vocab_size": 8, "vocab_offset": size}
    vision["model_args"] = {"channel_multiplier": 0.1}
    audio = {"vocab_size": 8, "vocab_offset": size + 8, "hidden_size": 32, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1}
    names = {f"{mark}_id": token for mark, token in roles.items()}
    config = transformers.Gemma3nConfig(
        text_config=decoder, vision_config=vision, audio_config=audio, vision_soft_tokens_per_image=256, tie_word_embeddings=True,
        **ids(words, **names),
    )  # fmt: skip
    return Parts("Gemma3nForConditionalGeneration", config, processor)
