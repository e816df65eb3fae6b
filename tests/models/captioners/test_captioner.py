import copy
import math
from dataclasses import replace

import pytest
import torch

from tests.models.families import IDS, in_double, plain_logprobs, plain_logprobs_and_entropies
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.draws import draw
from uae.types import Rollout, Sampling

TOLERANCE = {"atol": 1e-5, "rtol": 0}


def gradients(captioner, logp_NT, weights_NT):
    parameters = [p for p in captioner.learner.network.parameters() if p.requires_grad]
    return torch.autograd.grad((logp_NT * weights_NT).sum(), parameters, allow_unused=True, retain_graph=True)


def weights_of(rollout):
    return torch.randn(rollout.tokens_NT.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_fixture_holds_the_hard_cases(captioner, rollout):
    lengths = rollout.mask_RS.sum(1)
    assert rollout.tokens_NT.shape == (12, 8)
    assert 1 <= lengths.min() < 4  # ends early ...
    assert lengths.max() == 8  # ... and never
    assert not torch.isin(rollout.tokens_NT[lengths == 8, -1], torch.tensor(captioner.end_ids)).all()
    assert len(set(rollout.texts)) > 6
    if rollout.context.patches:  # pictures of two sizes: left padding
        assert len({len(x) for x in rollout.context.patches}) == 2
        assert sorted(rollout.context.rows["attention_mask"][:, 0].tolist()) == [0, 1]


# ------------------------------------------------------------------------------------------------- one policy


@torch.no_grad()
def test_ratio_is_one(captioner, rollout):
    logp_NT = captioner.logprobs(rollout)
    torch.testing.assert_close(logp_NT, rollout.logp_RS, **TOLERANCE)
    assert logp_NT.dtype == torch.float32
    assert ((rollout.logp_RS < 0) == rollout.mask_RS.bool()).all()


def test_logprobs_and_gradients_equal_one_plain_forward_per_caption(captioner, rollout):
    captioner = copy.deepcopy(captioner)
    captioner.learner.network.double()  # so that only the computation can differ, not its rounding
    rollout = replace(rollout, context=in_double(replace(rollout.context, features=None)))
    ours_NT, plain_NT = captioner.logprobs(rollout), plain_logprobs(captioner, rollout)
    hybrid = hasattr(captioner.language_model.layers[0], "linear_attn")  # computes in float32, whatever it is given
    torch.testing.assert_close(ours_NT.double(), plain_NT, atol=2e-5 if hybrid else 1e-6, rtol=0)
    ours, plain = (gradients(captioner, x_NT, weights_of(rollout)) for x_NT in (ours_NT, plain_NT))
    assert sum(gradient is not None for gradient in ours) > 20
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            largest = float(b.abs().max())
            torch.testing.assert_close(a, b, atol=1e-5 + 1e-4 * largest if hybrid else 1e-7 + 1e-6 * largest, rtol=0)
    image_tower = [p for name, p in captioner.learner.network.named_parameters() if "vis" in name and p.ndim > 1]
    assert gradients(captioner, ours_NT, weights_of(rollout))  # the prompt is part of the graph, up to the image:
    assert sum(p.abs().sum() > 0 for p in torch.autograd.grad(ours_NT.sum(), image_tower, allow_unused=True) if p is not None)


@torch.no_grad()
def test_the_samplers_entropy_is_that_of_the_whole_distribution(captioner, rollout):
    _, expected_NT = plain_logprobs_and_entropies(captioner, rollout)
    torch.testing.assert_close(rollout.entropy_RS, expected_NT, atol=1e-4, rtol=0)
    assert rollout.entropy_RS.max() > 1  # not degenerate


@torch.no_grad()
def test_greedy_equals_generate(captioner, images):
    context = captioner.prepare(images)
    ours = captioner.sample(context, 3, Sampling(0.0, 8), range(6))
    inputs = context.inputs()
    theirs = captioner.learner.network.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=8,
        suppress_tokens=captioner.learner.network.banned_ids.tolist(),
        eos_token_id=captioner.end_ids,
        pad_token_id=captioner.pad_id,
    )[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(ours.tokens_NT, theirs.repeat_interleave(3, 0))
    assert theirs.shape[1] > 2
    assert ours.temperature == 1.0


@torch.no_grad()
def test_left_padding_changes_nothing(captioner, images):
    """Also in families whose own processor never pads."""
    plain = captioner.prepare(images[:1])
    pads = {"input_ids": captioner.pad_id, "attention_mask": 0, "mm_token_type_ids": 0}
    rows = {name: torch.nn.functional.pad(x, (3, 0), value=pads[name]) if name in pads else x for name, x in plain.rows.items()}
    padded = captioner.sample(replace(plain, rows=rows), 6, Sampling(0.7, 8), range(6))
    alone = captioner.sample(plain, 6, Sampling(0.7, 8), range(6))
    assert torch.equal(padded.tokens_NT, alone.tokens_NT)
    torch.testing.assert_close(padded.logp_RS, alone.logp_RS, **TOLERANCE)
    torch.testing.assert_close(captioner.logprobs(padded), plain_logprobs(captioner, padded), **TOLERANCE)


@torch.no_grad()
def test_batch_composition_and_micro_batches_change_nothing(captioner, images, rollout):
    whole_NT = captioner.logprobs(rollout)
    context = captioner.prepare(images)
    for image in range(2):
        part = rollout.of([image], rollout.group)
        rows = slice(6 * image, 6 * image + 6)
        torch.testing.assert_close(captioner.logprobs(part), whole_NT[rows], **TOLERANCE)
        alone = captioner.sample(context.index([image]), 6, Sampling(0.7, 8), range(12)[rows])
        length = alone.tokens_NT.shape[1]
        assert torch.equal(alone.tokens_NT, rollout.tokens_NT[rows, :length])
        assert alone.texts == rollout.texts[rows]
    one_by_one = replace(rollout, context=context.index([0] * 6 + [1] * 6), group=1)
    torch.testing.assert_close(captioner.logprobs(one_by_one), whole_NT, **TOLERANCE)
    swapped = rollout.of([1, 0], rollout.group)
    torch.testing.assert_close(captioner.logprobs(swapped), whole_NT[[*range(6, 12), *range(6)]], **TOLERANCE)


@torch.no_grad()
def test_both_images_and_the_instruction_matter(captioner, images):
    context = captioner.prepare([*images, images[0]])
    again = captioner.prepare(images[:1], "background")
    a, b, c = (captioner.sample(x, 1, Sampling(1.0, 1), [0]) for x in (context.index([0]), context.index([2]), again))
    torch.testing.assert_close(captioner.logprobs(a), captioner.logprobs(b), **TOLERANCE)
    other = replace(a, context=context.index([1]))
    assert (captioner.logprobs(a) - captioner.logprobs(other)).abs().max() > 1e-3
    assert (captioner.logprobs(a) - captioner.logprobs(replace(a, context=c.context))).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def test_no_words_are_a_question_too(captioner, images):
    asked = [captioner.prepare(images, words).inputs()["input_ids"] for words in ("", None, captioner.instruction)]
    assert torch.equal(asked[1], asked[2])
    assert asked[0].shape[1] < asked[1].shape[1]


def test_samples_follow_the_policy(captioner, images):
    """Chi-square of 4000 first tokens against probabilities from a plain forward pass."""
    context, count = captioner.prepare(images[1:]), 4000
    drawn_N = captioner.sample(context, count, Sampling(0.7, 1), range(count)).tokens_NT[:, 0]
    logits_V = captioner.learner.network.model(**context.inputs()).logits[0, -1].double() / 0.7
    logits_V[captioner.learner.network.banned_ids] = -torch.inf
    expected_V = logits_V.softmax(-1) * count
    observed_V = torch.bincount(drawn_N, minlength=len(expected_V))
    assert observed_V[captioner.learner.network.banned_ids].sum() == 0
    common = expected_V >= 5
    assert common.sum() > 4
    pairs = [
        (observed_V[common], expected_V[common]),
        (observed_V[~common].sum()[None], expected_V[~common].sum()[None]),
    ]
    chi_square = sum(((o - e) ** 2 / e.clamp(min=1e-9)).sum().item() for o, e in pairs if e.sum() > 0.5)
    freedom = int(common.sum())
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@torch.no_grad()
def test_every_row_has_its_own_seed(captioner, images):
    context, sampling = captioner.prepare(images), Sampling(1.0, 8)
    first = captioner.sample(context, 3, sampling, [10, 11, 12, 13, 14, 15])
    again = captioner.sample(context, 3, sampling, [10, 99, 12, 13, 14, 15])
    same = [a == b for a, b in zip(first.texts, again.texts, strict=True)]
    assert same == [True, False, True, True, True, True]
    twins = captioner.sample(context, 3, sampling, [7] * 6)
    assert len(set(twins.texts[:3])) == len(set(twins.texts[3:])) == 1
    assert len(set(first.texts)) > 4


@torch.no_grad()
def test_banned_words_are_never_said(captioner, images):
    hot = captioner.sample(captioner.prepare(images), 200, Sampling(100.0, 4), range(400))
    said = hot.tokens_NT[hot.mask_RS.bool()]
    assert not torch.isin(said, captioner.learner.network.banned_ids).any()
    allowed = len(IDS) - len(captioner.learner.network.banned_ids)
    assert len(said.unique()) == allowed  # everything else is, at that temperature
    for banned in captioner.learner.network.banned_ids.tolist():
        tokens_NT = torch.tensor([[IDS["red"], banned]])
        given = {"mask_RS": torch.ones(1, 2), "logp_RS": torch.zeros(1, 2), "tokens_NT": tokens_NT}
        forced = Rollout(**given, texts=[""], context=hot.context.index([0]), group=1)
        logp_NT = captioner.logprobs(forced)
        assert logp_NT[0, 0] > -torch.inf
        assert logp_NT[0, 1] == -torch.inf


def test_vision_placeholders_and_padding_are_banned(captioner):
    assert {IDS["<|image_pad|>"], IDS["<|endoftext|>"]} <= set(captioner.learner.network.banned_ids.tolist())
    model = captioner.learner.network.model
    more = HFCaptioner(model, captioner.processor, "describe", extra_banned_ids=[IDS["user"]])
    assert set(more.learner.network.banned_ids.tolist()) - set(captioner.learner.network.banned_ids.tolist()) == {IDS["user"]}


def test_padding_behind_a_caption_has_a_finite_gradient(fresh, images):
    rollout = fresh.sample(fresh.prepare(images), 6, Sampling(0.7, 8), range(12))
    assert (rollout.mask_RS == 0).any()
    fresh.logprobs(rollout).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fresh.learner.network.parameters())


def test_tokens_behind_the_end_do_not_matter(captioner, rollout):
    tokens_NT = rollout.tokens_NT.masked_fill(rollout.mask_RS == 0, IDS["cyan"])
    with torch.no_grad():
        other_NT = captioner.logprobs(replace(rollout, tokens_NT=tokens_NT))
        assert torch.equal(other_NT, captioner.logprobs(rollout))


def test_a_caption_ends_with_its_first_end_token(captioner, rollout):
    words = captioner.processor.tokenizer
    for tokens, mask, text in zip(rollout.tokens_NT.tolist(), rollout.mask_RS.tolist(), rollout.texts, strict=True):
        ends = [t for t, token in enumerate(tokens) if token in captioner.end_ids]
        length = ends[0] + 1 if ends else len(tokens)
        assert mask == [1.0] * length + [0.0] * (len(tokens) - length)
        assert set(tokens[length:]) <= {captioner.pad_id}
        assert text == words.decode(tokens[:length], skip_special_tokens=True).strip()


def test_shipped_generation_settings_change_nothing(fresh, images):
    """Official checkpoints ship top_k, a repetition penalty and a temperature."""
    context, sampling = fresh.prepare(images), Sampling(1.0, 8)
    before = fresh.sample(context, 4, sampling, range(8))
    shipped = {"do_sample": True, "top_k": 1, "top_p": 0.001, "temperature": 0.1, "repetition_penalty": 5.0}
    fresh.learner.network.model.generation_config.update(**shipped)
    captioner = HFCaptioner(fresh.learner.network.model, fresh.processor, "describe")
    captioner.end_ids = fresh.end_ids
    after = captioner.sample(context, 4, sampling, range(8))
    assert torch.equal(before.tokens_NT, after.tokens_NT)
    assert torch.equal(before.logp_RS, after.logp_RS)
    assert torch.equal(fresh.logprobs(before), captioner.logprobs(after))


def test_all_shipped_end_tokens_end_a_caption(fresh):
    fresh.learner.network.model.generation_config.eos_token_id = [IDS["and"], IDS["on"]]
    captioner = HFCaptioner(fresh.learner.network.model, fresh.processor, "describe")
    assert captioner.end_ids == sorted([IDS["and"], IDS["on"], IDS["<|im_end|>"]])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_p": 0.9}, "sampling.top_p=0.9"),
        ({"top_k": 50}, "sampling.top_k=50"),
        ({"repetition_penalty": 1.05}, "sampling.repetition_penalty=1.05"),
        ({"temperature": -1.0}, "sampling.temperature=-1"),
        ({"max_tokens": 0}, "sampling.max_tokens=0"),
    ],
)
def test_sampling_refuses_what_the_log_probs_cannot_follow(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


def test_a_processor_without_a_chat_template_is_refused(fresh):
    fresh.processor.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        HFCaptioner(fresh.learner.network.model, fresh.processor, "describe")


def test_dropout_of_a_checkpoint_is_off_even_in_training(created, images):
    for family in ("qwen2_5_vl", "llava"):
        model = copy.deepcopy(created(family).learner.network.model)
        for module in model.modules():
            for name in ("attention_dropout", "dropout", "p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.5)
        captioner = HFCaptioner(model.train(), created(family).processor, "describe")
        rollout = captioner.sample(captioner.prepare(images), 2, Sampling(1.0, 4), range(4))
        with torch.no_grad():
            torch.testing.assert_close(captioner.logprobs(rollout), rollout.logp_RS, **TOLERANCE)


def test_images_are_rounded_to_eight_bits_and_clamped(captioner, images):
    plain = captioner.prepare(images).inputs()["pixel_values"]
    beyond = captioner.prepare([images[0] + 1e-4, images[1]]).inputs()["pixel_values"]
    assert (plain - beyond).abs().max() <= 2.1 / 255 / 0.25  # one step of 1/255, however it is normalised
    assert plain.std() > 0.3  # not divided by 255 twice
    white = captioner.prepare([images[0] * 0 + 3.0]).inputs()["pixel_values"]
    torch.testing.assert_close(white, captioner.prepare([images[0] * 0 + 1.0]).inputs()["pixel_values"])


def test_draws_invert_the_cumulative_distribution():
    """Also at the very ends: a word of probability 0 is never drawn, wherever it stands."""
    logp_NV = torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25, 0.0]]).log().expand(7, -1)
    uniform_N = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9, 1 - 2**-53], dtype=torch.float64)
    assert draw(logp_NV, uniform_N).tolist() == [1, 1, 2, 2, 4, 4, 4]
