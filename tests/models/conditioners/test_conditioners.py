import copy

import pytest
import torch

from uae.miniature.tiny import END, VOCABULARY
from uae.models.conditioners.states import (
    EmbeddingCondition,
    HiddenStateConditioner,
    TextConditioner,
    mlp_projector,
    pad_to_length,
)
from uae.models.finetune import Full, LoRA

TEXTS = ["a red square", "a tiny blue ring at top left and a white cross on a navy background", ""]
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def conditioner(decoder):
    return copy.deepcopy(decoder[0])


def plain(conditioner, text):
    """Embeddings of one caption, by hand: ids from the vocabulary, no batch, no mask."""
    ids = [VOCABULARY.index(word) for word in [*text.split(), END]]
    hidden = conditioner.language_model(torch.tensor([ids])).last_hidden_state[0]
    first, _, second = conditioner.projector
    return torch.nn.functional.gelu(hidden @ first.weight.T + first.bias) @ second.weight.T + second.bias


def test_rows_equal_one_caption_at_a_time(conditioner):
    condition = conditioner.encode(TEXTS)
    assert condition.mask_NL.sum(1).tolist() == [len(text.split()) + 1 for text in TEXTS]
    for row, text in enumerate(TEXTS):
        expected = plain(conditioner, text)
        torch.testing.assert_close(condition.embeds_NLD[row, : len(expected)], expected, **CLOSE)
        assert condition.embeds_NLD[row, len(expected) :].abs().sum() == 0
        assert condition.mask_NL[row].tolist() == [1] * len(expected) + [0] * (15 + 1 - len(expected))
        torch.testing.assert_close(condition.pooled_NP[row], expected.mean(0), **CLOSE)


def test_index_takes_rows(conditioner):
    condition = conditioner.encode(TEXTS)
    part = condition.index(range(2, 0, -1))
    assert len(condition) == 3
    assert len(part) == 2
    for name in ("embeds_NLD", "mask_NL", "pooled_NP"):
        assert torch.equal(getattr(part, name), getattr(condition, name)[[2, 1]])


def test_no_pooled_vector_where_none_is_wanted(conditioner):
    conditioner.pooled = "none"
    condition = conditioner.encode(TEXTS)
    assert condition.pooled_NP is None
    assert condition.index([0]).pooled_NP is None
    assert pad_to_length(condition, 99).pooled_NP is None


def test_the_gradient_reaches_the_projector(conditioner):
    conditioner.projector.requires_grad_(True)
    conditioner.encode(TEXTS).embeds_NLD.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in conditioner.projector.parameters())


def test_padding_appends_masked_zeros():
    once = EmbeddingCondition(torch.ones(2, 3, 4), torch.ones(2, 3), torch.ones(2, 5))
    longer = pad_to_length(once, 5)
    assert longer.embeds_NLD.sum((0, 2)).tolist() == [8, 8, 8, 0, 0]
    assert longer.mask_NL.tolist() == [[1, 1, 1, 0, 0]] * 2
    assert longer.pooled_NP is once.pooled_NP
    assert pad_to_length(once, 3) is once
    assert pad_to_length(once, 2) is once  # never cut


def test_a_caption_that_is_too_long_is_cut_and_counted(conditioner):
    conditioner.max_tokens = 15
    with pytest.warns(UserWarning, match="1 of 3 captions .* max_tokens=15: raise model.init_args.system.init_args.condition_tokens"):
        condition = conditioner.encode(TEXTS)
    cut = plain(conditioner, TEXTS[1].removesuffix(" background"))  # the end of sequence is still there
    assert condition.mask_NL.sum(1).tolist() == [4, 15, 1]
    torch.testing.assert_close(condition.embeds_NLD[1], cut, **CLOSE)
    assert conditioner.truncated == 1
    with pytest.warns(UserWarning, match="2 of 2 captions"):
        conditioner.encode([TEXTS[1]] * 2)
    assert conditioner.truncated == 3
    conditioner.max_tokens = 16
    conditioner.encode(TEXTS)
    assert conditioner.truncated == 3


def test_a_template_without_a_caption_is_an_error(conditioner):
    with pytest.raises(ValueError, match=r"'draw it' has no \{caption\}"):
        HiddenStateConditioner(conditioner.language_model, conditioner.tokenizer, conditioner.projector, "draw it")


def test_the_template_surrounds_the_caption(conditioner):
    conditioner.template = "a {caption} " + END
    torch.testing.assert_close(conditioner.encode(["red square"]).embeds_NLD[0], plain(conditioner, "a red square"), **CLOSE)


def test_an_empty_caption_without_a_template_reads_one_padding_token(conditioner):
    conditioner.template = "{caption}"
    condition = conditioner.encode(["", "a red square"])
    assert condition.mask_NL.sum(1).tolist() == [1, 3]
    assert condition.pooled_NP.isfinite().all()


def test_one_pooled_vector_for_every_caption(conditioner):
    for vector in (torch.arange(5.0), torch.arange(5.0)[None]):
        made = HiddenStateConditioner(
            conditioner.language_model, conditioner.tokenizer, conditioner.projector, "{caption} a", pooled=vector
        )
        assert made.encode(TEXTS).pooled_NP.tolist() == [[0, 1, 2, 3, 4]] * 3
        assert not any("pooled" in name for name in made.state_dict())
        assert copy.deepcopy(made).to("meta").pooled.is_meta  # moves along
    with pytest.raises(ValueError, match="pooled='max'; allowed: mean, none or a vector"):
        HiddenStateConditioner(conditioner.language_model, conditioner.tokenizer, conditioner.projector, pooled="max")


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_the_projector_is_two_linear_maps(activation):
    projector, x = mlp_projector(3, 5, 2, activation).double(), torch.randn(4, 3, dtype=torch.float64)
    first, second = ((layer.weight, layer.bias) for layer in (projector[0], projector[2]))
    y = x @ first[0].T + first[1]
    gate = (1 + torch.erf(y / 2**0.5)) / 2 if activation == "gelu" else 1 / (1 + torch.exp(-y))  # exact, not by tanh
    torch.testing.assert_close(projector(x), (y * gate) @ second[0].T + second[1], atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="activation='relu'; allowed: gelu, silu"):
        mlp_projector(3, 5, 2, "relu")


# ------------------------------------------------------------------------------------- the captioner's own decoder


TEMPLATE = "<|im_start|> generate {caption} <|im_end|> <|im_start|> assistant"


@pytest.fixture
def projector():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp_projector(128, 32, 16)


def borrowing(captioner, projector, **arguments):
    """A conditioner that reads with the captioner's decoder."""
    words = captioner.processor.tokenizer
    return HiddenStateConditioner(lambda: captioner.language_model, words, projector, TEMPLATE, **arguments)


def plain_states(model, projector, text):
    """Embeddings of one caption by the whole vision-language model, as its own forward calls it: one row, no padding."""
    prompt = TEMPLATE.replace("{caption}", text).split()
    ids = torch.tensor([[VOCABULARY.index(word) if word in VOCABULARY else VOCABULARY.index("<|unk|>") for word in prompt]])
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    return projector(out.hidden_states[-1])[0]


def check_rows(condition, model, projector, tolerance=1e-5):
    for row, text in enumerate(TEXTS):
        expected = plain_states(model, projector, text)
        assert condition.mask_NL[row].sum() == len(expected)
        torch.testing.assert_close(condition.embeds_NLD[row, : len(expected)], expected, atol=tolerance, rtol=0)


def learned(captioner):
    """An adapter that has learned something."""
    LoRA(rank=2).attach(captioner.learner, keep_reference=True)
    with torch.no_grad():
        for name, weight in captioner.learner.network.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))  # as large on every machine


def test_a_borrowed_decoder_conditions_as_the_model_itself(fresh, projector):
    check_rows(borrowing(fresh, projector).encode(TEXTS), fresh.learner.network.model, projector)


def test_a_borrowed_decoder_follows_the_adapter(fresh, projector):
    before = borrowing(fresh, projector).encode(TEXTS).embeds_NLD
    conditioner = borrowing(fresh, projector)
    starting = borrowing(fresh, projector, weights=fresh.learner.reference)
    learned(fresh)
    live = conditioner.encode(TEXTS)
    assert (live.embeds_NLD - before).abs().max() > 1e-2
    check_rows(live, fresh.learner.network.model, projector, tolerance=1e-4)  # the adapter makes states large
    torch.testing.assert_close(starting.encode(TEXTS).embeds_NLD, before, **CLOSE)
    assert torch.equal(conditioner.encode(TEXTS).embeds_NLD, live.embeds_NLD)  # the adapter is back


def test_a_borrowed_decoder_follows_full_finetuning(fresh, projector):
    Full().attach(fresh.learner, keep_reference=True)
    conditioner, starting = borrowing(fresh, projector), borrowing(fresh, projector, weights=fresh.learner.reference)
    before = conditioner.encode(TEXTS).embeds_NLD
    with torch.no_grad():
        fresh.language_model.norm.weight.mul_(1.5)
    assert not torch.allclose(conditioner.encode(TEXTS).embeds_NLD, before, atol=1e-2)
    assert torch.equal(starting.encode(TEXTS).embeds_NLD, before)


def test_a_borrowed_decoder_is_no_part_of_the_conditioner(fresh, projector):
    conditioner = borrowing(fresh, projector)
    assert set(conditioner.state_dict()) == {"projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias"}
    assert len(list(conditioner.parameters())) == 4
    conditioner.requires_grad_(False).train().to(torch.float64)
    policy = fresh.learner.network.model
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.parameters())
    assert not policy.training
    assert conditioner.encode(TEXTS).embeds_NLD.dtype == torch.float64


def test_gradient_passes_only_where_it_is_enabled(fresh, projector):
    conditioner = borrowing(fresh, projector)
    with torch.no_grad():
        assert not conditioner.encode(TEXTS).embeds_NLD.requires_grad
    conditioner.encode(TEXTS).embeds_NLD.square().sum().backward()
    weights = [fresh.language_model.layers[0].mlp.up_proj.weight, projector[0].weight]
    assert all(weight.grad.abs().sum() > 0 for weight in weights)


def test_the_projector_has_a_precision_of_its_own(fresh, projector):
    exact = borrowing(fresh, projector).encode(TEXTS).embeds_NLD
    fresh.learner.network.to(torch.bfloat16)
    condition = borrowing(fresh, projector, pooled=torch.ones(3, dtype=torch.float64)).encode(TEXTS)
    assert condition.embeds_NLD.dtype == condition.pooled_NP.dtype == torch.float32
    assert 0 < (condition.embeds_NLD - exact).abs().max() < 0.1 * exact.abs().max()


def test_captions_as_they_are():
    condition = TextConditioner().to("cpu").encode(TEXTS)
    assert condition.texts == TEXTS
    assert len(condition) == 3
    assert condition.index([2, 0]).texts == ["", "a red square"]
