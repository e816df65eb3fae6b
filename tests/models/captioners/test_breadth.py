"""Families of vision-language models, each the hard case of something, against the library's own forward pass on one image alone."""

from dataclasses import replace

import pytest
import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from benchmarks.breadth import captioners
from benchmarks.breadth.tiny import catalog, parts
from uae.grpo import LogitRule
from uae.models.captioners import own_forward
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.loading import Reading, assemble_captioner
from uae.models.captioners.policy import CaptionPolicy, VLMContext
from uae.models.captioners.special_tokens import sight_ids

CASES = {
    "Gemma 4": "a cap on logits, windows shorter than the prompt, keys that layers share, embeddings of every layer",
    "PaliGemma 2": "a cap on logits, windows, a prompt that looks both ways",
    "Granite-Docling": "scaled logits, tiles padded to the same number, features of deep layers",
    "LFM2-VL": "tiles of different numbers of patches, short convolutions, a begin token in the template",
    "Molmo2": "lists of patches to pool, counted from the first patch of the batch",
    "Llama 4": "attention in chunks, no module for all but the head",
}


@pytest.mark.parametrize("family", CASES)
def test_a_family_is_its_own_forward_pass(family, monkeypatch):
    if family == "Llama 4":  # transformers 5.24 reads a field that it does not make, so its own forward pass fails
        monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    verdict = captioners.measure(family)
    assert (verdict.word, verdict.said) == ("works", "")
    assert verdict.layers == 1
    assert verdict.checkpointing == "same" or "linear attention" in verdict.checkpointing


def no_rule(monkeypatch):
    """The outputs of the last layer are taken for logits."""
    monkeypatch.setattr(own_forward, "_rule", lambda *_: LogitRule())
    monkeypatch.setattr(own_forward, "_check_continuation", lambda *_: None)


def row_by_row(monkeypatch):
    """Every tensor of the processor is cut as if it had one row per image."""
    honest = VLMContext.index
    monkeypatch.setattr(VLMContext, "index", lambda self, images: honest(replace(self, again=None), images))


def two_begins(monkeypatch):
    """The tokenizer adds a begin token to the one of the template."""
    honest = HFCaptioner._read

    def read(self, images, prompts):
        begin, self.processor.tokenizer.bos_token = self.processor.tokenizer.bos_token, None
        try:
            return honest(self, images, prompts)
        finally:
            self.processor.tokenizer.bos_token = begin

    monkeypatch.setattr(HFCaptioner, "_read", read)


def unplaced(monkeypatch):
    """Positions are counted through the padding."""
    honest = CaptionPolicy.advance

    def advance(self, prefix, tokens_NT):
        prefix.offset_N = torch.full_like(prefix.offset_N, int(prefix.offset_N.max()))
        return honest(self, prefix, tokens_NT)

    monkeypatch.setattr(CaptionPolicy, "advance", advance)


@pytest.mark.parametrize(
    ("mistake", "family", "shown"),
    [
        (no_rule, "Granite-Docling", "logp"),
        (no_rule, "PaliGemma 2", "logp"),
        (row_by_row, "Molmo2", "crash"),
        (two_begins, "Mistral3", "logp"),
        (unplaced, "Gemma 4", "logp"),
    ],
)
def test_a_planted_mistake_shows(monkeypatch, mistake, family, shown):
    """As nothing of it shows in the ratio of sampler and update, which have the same mistake."""
    mistake(monkeypatch)
    verdict = captioners.measure(family)
    assert shown in verdict.word
    assert not (verdict.ratio or 0) > captioners.LOGP


def test_logits_that_nobody_explains_are_refused(monkeypatch):
    made = catalog.FAMILIES["Granite-Docling"]()
    model = parts.model(made)
    model.config.text_config.logits_scaling = 0.7
    honest = type(model).forward

    def squared(self, *args, **kwargs):
        out = honest(self, *args, **kwargs)
        out.logits = out.logits.abs().sqrt()
        return out

    monkeypatch.setattr(type(model), "forward", squared)
    with pytest.raises(ValueError, match=r"logits of GraniteDocling.* are not those .*model\.init_args\.system\.init_args\.captioner"):
        HFCaptioner(model, made.processor, "Describe.")


def test_compiled_steps_are_refused_where_layers_have_windows():
    made = catalog.FAMILIES["Gemma 3"]()
    with pytest.raises(ValueError, match=r"reading\.compile=true, but Gemma3.*DynamicSlidingWindowLayer.*compile to false"):
        assemble_captioner(parts.model(made), made.processor, Reading(compile=True), "Describe.")


MARKS = {
    "Ovis2": {"<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>", "<image>"},
    "GLM-4V": {"<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|video|>", "<|end_of_video|>"},
    "LFM2-VL": {"<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"},
    "Molmo2": {"<|image|>", "<im_patch>", "<im_col>", "<im_start>", "<im_end>", "<low_res_im_start>"},
    "Gemma 4": {"<image_soft_token>", "<start_of_image>", "<end_of_image>", "<audio_soft_token>", "<start_of_audio>"},
    "Kimi-K2.5": {"<|media_begin|>", "<|media_pad|>", "<|media_end|>"},
}


@pytest.mark.parametrize("family", MARKS)
def test_no_caption_has_a_token_that_stands_for_an_image_or_surrounds_one(family):
    made = catalog.FAMILIES[family]()
    words = made.processor.tokenizer
    banned = {words.convert_ids_to_tokens(number) for number in sight_ids(made.config, made.processor)}
    assert MARKS[family] <= banned
    assert not banned & {"<|im_start|>", "<|im_end|>", "<s>", *words.tokenize("Describe the image, a video, an img.")}
