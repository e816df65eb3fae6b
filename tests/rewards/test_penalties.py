import pytest
import torch

from uae.rewards import CopiedInstruction, ForeignScript, LengthBand, Repetition

NOTHING = torch.zeros(1, 3, 4, 4)


def penalties(reward, *texts):
    """Of several captions of one image, the way a run asks for them."""
    result = reward(NOTHING, NOTHING.expand(len(texts), -1, -1, -1), list(texts))
    assert result.shape == (1, len(texts))
    assert result.dtype is torch.float32
    return result[0].tolist()


def test_length_is_free_in_the_band_and_linear_outside():
    reward = LengthBand(shortest=3, longest=5, margin=4)
    texts = [" ".join(["word"] * words) for words in (0, 1, 2, 3, 4, 5, 6, 8, 9, 50)]
    assert penalties(reward, *texts) == [-0.75, -0.5, -0.25, 0, 0, 0, -0.25, -0.75, -1, -1]
    assert penalties(reward, "  a\n b\tc  ") == [0]
    with pytest.raises(ValueError, match="shortest=6 is above longest=5; lower the reward's init_args.shortest"):
        LengthBand(6, 5, 1)


def test_repetition_is_the_share_of_ngrams_that_were_there_before():
    texts = ["a b c a b d", "A b a B a b", "one two", "", "a b c d e f g"]
    assert penalties(Repetition(ngram=2), *texts) == pytest.approx([-1 / 5, -3 / 5, 0, 0, 0])
    assert penalties(Repetition(ngram=1), "no no no no") == [-0.75]


def test_script_counts_letters_and_symbols_of_other_scripts():
    texts = ["a naïve café, 24 % of $7!", "ab 漢字", "日本語", "cat \N{CAT FACE}", "abc\N{REPLACEMENT CHARACTER}", "", "12 : 3"]
    expected = [0, -0.5, -1, -0.25, -0.25, 0, 0]
    assert penalties(ForeignScript(), *texts) == pytest.approx(expected)
    assert penalties(ForeignScript(("LATIN", "CJK")), "ab 漢字", "ab жж") == [0, -0.5]
    assert penalties(ForeignScript(), "un gatto rosso") == [0]  # another language in the same letters is not seen
    for wrong in (("latin",), ("LATIN", "KLINGON"), ()):
        with pytest.raises(ValueError, match=r"(latin|KLINGON|none given); allowed: .*init_args.scripts"):
            ForeignScript(wrong)


def test_a_copied_instruction_costs_the_share_that_was_copied():
    reward = CopiedInstruction("Describe this image in so much detail as you can", free=2)  # 10 words, 8 beyond the free ones
    texts = [
        "Describe this image in so much detail as you can", "I will describe THIS image in detail.", "In so much pain",
        "a red cat", "detail in image this describe", "",
    ]  # fmt: skip
    assert penalties(reward, *texts) == [-1, -2 / 8, -1 / 8, 0, 0, 0]
    with pytest.raises(ValueError, match="has 2 words, and 2 may be copied at no cost.*init_args.free"):
        CopiedInstruction("Describe it", free=2)
