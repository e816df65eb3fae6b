"""Tiny random models that see, in the layouts of the released ones: a detector, a CLIP, two that answer questions."""

import json

import open_clip
import torch

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
BLIP = "Salesforce/blip-vqa-base"
COLOR_MODEL = "tiny-color-quickgelu"
QUESTION_WORDS = ["is", "there", "a", "the", "cat", "dog", "red", "?", "yes", "no", "maybe"]


def mask2former(folder, categories=80):
    """Random, but sure of what it sees: class scores are spread until some are near 1."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    backbone = SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=20, num_labels=categories,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
        model.class_predictor.weight.data.normal_(0, 2.0)
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder)


def color_clip(folder, quick_gelu=True):
    """Registers ``tiny-color-quickgelu``; returns its model and its weights file."""
    config = {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{COLOR_MODEL}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = open_clip.create_model(COLOR_MODEL)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    torch.save(model.state_dict(), folder / "weights.pt")
    return model.eval(), folder / "weights.pt"


def blip(folder, seed=6):
    """Answers yes or no, by what it sees and is asked, for as many words as it may."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *QUESTION_WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, bos_token="[DEC]")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **small, "encoder_hidden_size": 16, "vocab_size": len(words), "bos_token_id": 5, "pad_token_id": 0, "sep_token_id": 3,
        "eos_token_id": 3, "initializer_range": 0.5, "max_position_embeddings": 32, "is_decoder": True,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlipForQuestionAnswering(config)
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.data.normal_(0, 0.0 if name.endswith("bias") else 1.0)
    choice = model.text_decoder.cls.predictions.bias.data
    choice[[words.index("yes"), words.index("no")]] = 1000.0  # the first word of an answer is one of these
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
