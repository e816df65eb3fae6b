import pytest
import torch
from torch import nn

from uae.models.conditioners.joined import JoinedConditioner
from uae.models.conditioners.states import EmbeddingCondition, TextConditioner

TEXTS = ["a", "bcd", ""]


class Letters(nn.Module):
    """One token per letter and an end, in front of ``extra`` positions of padding that hold rubbish."""

    def __init__(self, shift, width=2, extra=0, pooled=True):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.shift, self.width, self.extra, self.pooled, self.truncated = shift, width, extra, pooled, 0

    def encode(self, texts, rollout=None):
        self.rollout = rollout
        self.truncated += sum(len(text) > 2 for text in texts)
        length = max(map(len, texts)) + 1 + self.extra
        rows = [[ord(letter) + self.shift for letter in text + "."] for text in texts]
        embeds = torch.tensor([row + [-7.0] * (length - len(row)) for row in rows])[..., None].expand(-1, -1, self.width)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        pooled = torch.full((len(texts), 3), float(self.shift)) if self.pooled else None
        return EmbeddingCondition(embeds * self.scale, mask, pooled)


class Frozen:
    """A conditioner that is no module, as one around a pipeline."""

    truncated = 4

    def encode(self, texts, rollout=None):
        return EmbeddingCondition(torch.full((len(texts), 2, 2), 0.5, dtype=torch.bfloat16), torch.ones(len(texts), 2))

    def to(self, device):
        self.device = device
        return self


@pytest.mark.parametrize("order", [[0], [0, 1], [1, 0], [2, 0, 1], [0, 2, 1, 0]])
def test_rows_are_the_parts_tokens_one_after_the_other(order):
    parts = [Letters(0), Letters(1000, extra=2), Frozen()]
    condition = JoinedConditioner([parts[n] for n in order]).encode(TEXTS)
    expected = []
    for text in TEXTS:
        letters = [float(ord(letter)) for letter in text + "."]
        said = [letters, [x + 1000 for x in letters], [0.5, 0.5]]
        expected.append([x for n in order for x in said[n]])
    longest = max(map(len, expected))
    assert condition.embeds_NLD.shape == (3, longest, 2)  # no column of padding alone
    for row, tokens in enumerate(expected):
        assert condition.mask_NL[row].tolist() == [1] * len(tokens) + [0] * (longest - len(tokens))  # right-padded
        assert condition.embeds_NLD[row, : len(tokens)].tolist() == [[x, x] for x in tokens]
    assert condition.pooled_NP is None


def test_a_row_does_not_depend_on_the_others():
    joined = JoinedConditioner([Letters(0), Letters(1000)])
    texts = [*TEXTS, "abcdefghij" * 30]  # so long that a sort that may reorder equals, does
    together = joined.encode(texts)
    for row, text in enumerate(texts):
        alone = joined.encode([text])
        assert alone.mask_NL.all()
        assert torch.equal(together.embeds_NLD[row, : alone.mask_NL.shape[1]], alone.embeds_NLD[0])


def test_pooled_comes_from_the_named_part():
    parts = [Letters(3), Frozen(), Letters(5)]
    for n, value in ((0, 3.0), (2, 5.0)):
        assert JoinedConditioner(parts, pooled_from=n).encode(TEXTS).pooled_NP.tolist() == [[value] * 3] * 3
    with pytest.raises(ValueError, match=r"pooled_from=1, but that part \(Frozen\) has no pooled vector"):
        JoinedConditioner(parts, pooled_from=1).encode(TEXTS)
    with pytest.raises(ValueError, match="pooled_from=3; allowed: None or 0 to 2"):
        JoinedConditioner(parts, pooled_from=3)


def test_parts_are_moved_trained_and_counted():
    parts = [Frozen(), Letters(0), Letters(1, pooled=False)]
    joined = JoinedConditioner(parts)
    rollout = object()
    joined.encode(TEXTS, rollout).embeds_NLD.sum().backward()
    assert joined.truncated == 4 + 1 + 1
    assert parts[1].rollout is rollout
    assert set(joined.state_dict()) == {"parts.1.scale", "parts.2.scale"}
    assert all(part.scale.grad != 0 for part in parts[1:])
    assert joined.to("meta") is joined
    assert parts[0].device == "meta"
    assert parts[1].scale.is_meta


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one part or more"):
        JoinedConditioner([])
    with pytest.raises(ValueError, match=r"widths \[2, 3\]; they must be equal"):
        JoinedConditioner([Letters(0), Letters(0, width=3)]).encode(TEXTS)
    with pytest.raises(ValueError, match="TextConditioner gives no embeddings"):
        JoinedConditioner([Letters(0), TextConditioner()]).encode(TEXTS)
