import copy

import pytest
import torch

from uae.models.conditioners import EmbeddingCondition, HiddenStateConditioner, TextConditioner, pad_to_length
from uae.systems.tiny import END, VOCABULARY

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


def test_a_caption_that_is_too_long_is_an_error(conditioner):
    conditioner.max_tokens = 15
    with pytest.raises(ValueError, match="16 tokens; the conditioner takes 15: raise max_tokens"):
        conditioner.encode(TEXTS)
    conditioner.max_tokens = 16
    conditioner.encode(TEXTS)


def test_a_template_without_a_caption_is_an_error(conditioner):
    with pytest.raises(ValueError, match=r"'draw it' has no \{caption\}"):
        HiddenStateConditioner(conditioner.language_model, conditioner.tokenizer, conditioner.projector, "draw it")


def test_the_template_surrounds_the_caption(conditioner):
    conditioner.template = "a {caption} " + END
    torch.testing.assert_close(
        conditioner.encode(["red square"]).embeds_NLD[0], plain(conditioner, "a red square"), **CLOSE
    )


def test_captions_as_they_are():
    condition = TextConditioner().to("cpu").encode(TEXTS)
    assert condition.texts == TEXTS
    assert len(condition) == 3
    assert condition.index([2, 0]).texts == ["", "a red square"]
