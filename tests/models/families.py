"""Random-weight captioners of several library families, and the plain forward pass they are compared with."""

from dataclasses import replace

import torch

from uae.miniature import tiny
from uae.miniature.tiny import CHAT_TEMPLATE, IMAGE, INSTRUCTION, VOCABULARY, create_captioner, processor
from uae.models.captioners.captioner import HFCaptioner

IDS = {word: i for i, word in enumerate(VOCABULARY)}
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "internvl", "qwen3_5")
FULL_ATTENTION = FAMILIES[:5]  # the last has layers of linear attention
VISION_TOKENS = {"image_token_id": IDS[IMAGE], "video_token_id": IDS["<|video_pad|>"]}
VISION_TOKENS |= {f"vision_{side}_token_id": IDS[f"<|vision_{side}|>"] for side in ("start", "end")}
WIDE = {"shortest_edge": 24 * 24, "longest_edge": 24 * 48}  # images of several sizes, so prompts of several lengths


def create(family, **settings):
    """A captioner in eval mode whose next-token distributions are far from uniform and from certain."""
    with torch.random.fork_rng():
        torch.manual_seed(2 if family == "llava_onevision" else 1)  # captions of one word would show little
        model, words = globals()[family](**settings)
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # large enough that the image and every word matter
                torch.nn.init.normal_(weight, 0, 0.1 if "embed" in name or "lm_head" in name else 1.2 / weight[0].numel() ** 0.5)
        model.generation_config.eos_token_id = IDS["<|im_end|>"]
        model.generation_config.pad_token_id = IDS["<|endoftext|>"]
    captioner = HFCaptioner(model.eval(), words, INSTRUCTION)
    captioner.end_ids += [IDS[word] for word in ("and", "gray", "tiny", "ring")]  # random weights rarely end a caption
    return captioner


def tokenizer(**marks):
    """One token per word; ``marks`` are special tokens by the name an attribute has, which a saved folder keeps."""
    words = tiny.tokenizer()
    return type(words)(
        tokenizer_object=words.backend_tokenizer, eos_token=words.eos_token, pad_token=words.pad_token,
        unk_token=words.unk_token, extra_special_tokens=marks, padding_side="left",
    )  # fmt: skip


def qwen2_5_vl(layers=2):
    words = processor()
    words.image_processor.size = WIDE
    return create_captioner(layers=layers), words


def qwen3_vl(layers=2):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": len(VOCABULARY), "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **VISION_TOKENS)
    return Qwen3VLForConditionalGeneration(config), qwen3_processor()


def qwen3_5(layers=2):
    """Every second layer is linear attention."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": len(VOCABULARY), "tie_word_embeddings": True, "full_attention_interval": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2],
                            "partial_rotary_factor": 1.0},
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 64,
    }  # fmt: skip
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **VISION_TOKENS)
    return Qwen3_5ForConditionalGeneration(config), qwen3_processor()


def qwen3_processor():
    from transformers import Qwen3VLProcessor

    words = processor()
    words = Qwen3VLProcessor(words.image_processor, words.tokenizer, words.video_processor, CHAT_TEMPLATE)
    words.image_processor.size = WIDE
    return words


def llava(layers=2):
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    text = text_config(layers)
    vision = CLIPVisionConfig(
        image_size=24, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IDS[IMAGE]))
    side = {"height": 24, "width": 24}
    pixels = CLIPImageProcessor(size=side, crop_size=side)
    words = LlavaProcessor(
        pixels, tokenizer(), patch_size=8, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
        image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip
    return model, words


def llava_onevision(layers=2):
    """Pictures are cut into tiles of 16 x 16, whose pixels are padded to the same number of tiles."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        vision_use_head=False,
    )  # fmt: skip
    grids = {"image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32]]}
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text_config(layers), vision_feature_select_strategy="full",
        image_token_id=IDS[IMAGE], video_token_id=IDS["<|video_pad|>"], tie_word_embeddings=False, **grids,
    )  # fmt: skip
    sides = {"size": {"height": 16, "width": 16}}
    words = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**sides, **grids), tokenizer(), LlavaOnevisionVideoProcessor(**sides),
        num_image_tokens=16, vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE,
        image_token=IMAGE, video_token="<|video_pad|>",
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), words


def internvl(layers=2):
    """Pictures are cut into tiles of 16 x 16: four of a square one, two of a wide one, and a thumbnail of the whole."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
    )

    vision = InternVLVisionConfig(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    config = InternVLConfig(
        vision_config=vision, text_config=text_config(layers), image_token_id=IDS[IMAGE], image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    marks = {"start_image_token": "<|vision_start|>", "end_image_token": "<|vision_end|>", "context_image_token": IMAGE,
             "video_token": "<|video_pad|>"}  # fmt: skip
    sides = {"size": {"height": 16, "width": 16}}
    words = InternVLProcessor(
        GotOcr2ImageProcessor(**sides, max_patches=4), tokenizer(**marks), InternVLVideoProcessor(**sides),
        image_seq_length=4, chat_template=CHAT_TEMPLATE.replace("<|vision_start|> ", "").replace("<|vision_end|> ", ""),
    )  # fmt: skip
    return InternVLForConditionalGeneration(config), words


def text_config(layers):
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip


def in_double(context):
    """A captioner's context with all numbers in float64."""

    def cast(rows):
        return {name: x.double() if torch.is_floating_point(x) else x for name, x in rows.items()}

    again = context.again and (lambda images: cast(context.again(images)))
    return replace(context, rows=cast(context.rows), patches=tuple(x.double() for x in context.patches), again=again)


def plain_logprobs(captioner, rollout):
    """Log-probs ``[N, T]``, one caption at a time: no padding, no cache, no group; the whole prompt and the caption.

    Differentiable; masked positions are 0.
    """
    return plain_logprobs_and_entropies(captioner, rollout)[0]


def plain_logprobs_and_entropies(captioner, rollout):
    """As `plain_logprobs`, and the entropies ``[N, T]`` of the distributions at each position."""
    policy, context = captioner.learner.network, rollout.context
    rows = []
    for n, (tokens, mask) in enumerate(zip(rollout.tokens_NT, rollout.mask_RS, strict=True)):
        inputs = context.index([n // rollout.group]).inputs()
        length = int(mask.sum())
        real = inputs["attention_mask"][0].bool()
        said = {"input_ids": tokens[:length], "attention_mask": torch.ones_like(tokens[:length])}
        said["mm_token_type_ids"] = torch.zeros_like(tokens[:length])  # left out, positions are silently wrong
        for name, continuation in said.items():
            if name in inputs:
                inputs[name] = torch.cat([inputs[name][0][real], continuation])[None]
        logits_TV = policy.model(**inputs, use_cache=False).logits[0, -length - 1 : -1]
        logits_TV = logits_TV / rollout.temperature
        logits_TV[:, captioner.learner.network.banned_ids] = -torch.inf
        logp_TV = logits_TV.log_softmax(-1)
        entropy_T = torch.stack([-sum(p * p.log() for p in row.exp() if p > 0) for row in logp_TV])
        both = logp_TV[range(length), tokens[:length]], entropy_T
        rows.append([torch.nn.functional.pad(values_T, (0, len(tokens) - length)) for values_T in both])
    return tuple(torch.stack(values) for values in zip(*rows, strict=True))
