"""Penalties for captions that say little of the image: too long, repeated, in other letters, copied from the instruction.

They read the caption only, and all lie in [-1, 0], so that a weight says what the worst caption costs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher

from jsonargparse.typing import NonNegativeInt, PositiveInt

from uae.rewards.caption import CaptionReward


class LengthBand(CaptionReward):
    """0 for a caption of ``shortest`` to ``longest`` words; outside it falls with every word, to -1 at ``margin`` words.

    A word is what stands between white space, so this is of no use for languages that are written without spaces.

    Args:
        shortest: Fewest words without a penalty.
        longest: Most words without a penalty; at least ``shortest``.
        margin: Number of words too few or too many that costs 1.

    Raises:
        ValueError: ``shortest`` is above ``longest``.
    """

    def __init__(self, shortest: NonNegativeInt, longest: PositiveInt, margin: PositiveInt) -> None:
        if shortest > longest:
            raise ValueError(
                f"shortest={shortest} is above longest={longest}; lower the reward's init_args.shortest or raise its init_args.longest"
            )
        self.shortest, self.longest, self.margin = shortest, longest, margin

    def score(self, text: str) -> float:
        """Minus the number of words outside the band, divided by ``margin``; not below -1."""
        words = len(text.split())
        outside = max(self.shortest - words, words - self.longest, 0)
        return -float(min(1.0, outside / self.margin))


class Repetition(CaptionReward):
    """Minus the share of word n-grams of a caption that repeat an earlier one. Case does not count.

    It does not see the same thing said in other words. A list of several equal objects ("a red ball, a red ball") is
    punished too.

    Args:
        ngram: Number of words of an n-gram. A caption with fewer words has no repetition.
    """

    def __init__(self, ngram: PositiveInt = 3) -> None:
        self.ngram = ngram

    def score(self, text: str) -> float:
        """Different n-grams divided by all n-grams, minus 1; 0 without an n-gram."""
        words = text.casefold().split()
        grams = [tuple(words[start : start + self.ngram]) for start in range(len(words) - self.ngram + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0


class ForeignScript(CaptionReward):
    """Minus the share of letters and symbols of a caption that belong to other scripts than the allowed ones.

    It sees a policy that drifts into other alphabets, emoji, arrows or damaged characters. It does not see another language
    in the same alphabet, nor invented words: put `uae.rewards.CaptionFormat` or the length beside it. Digits, punctuation,
    currency and mathematical signs, accents and white space count for nothing.

    Args:
        scripts: Allowed scripts, each the first word of the Unicode names of its letters: LATIN, GREEK, CYRILLIC, ARABIC,
            HEBREW, DEVANAGARI, HANGUL, HIRAGANA, KATAKANA, CJK, ...

    Raises:
        ValueError: No script is given, or no letter of Unicode's first plane has a name that begins so.
    """

    def __init__(self, scripts: Sequence[str] = ("LATIN",)) -> None:
        self.scripts = frozenset(scripts)
        unknown = sorted(self.scripts - _known_scripts())
        if unknown or not scripts:
            raise ValueError(
                f"scripts={list(scripts)}: {', '.join(unknown) or 'none given'}; allowed: first words of Unicode names of "
                "letters, such as LATIN, GREEK, CYRILLIC, CJK; set the reward's init_args.scripts"
            )

    def score(self, text: str) -> float:
        """Minus the share of counted characters outside ``scripts``; 0 if no character counts."""
        counted = [c for c in unicodedata.normalize("NFC", text) if _is_counted(c)]
        foreign = sum(_script(c) not in self.scripts for c in counted)
        return -foreign / len(counted) if counted else 0.0


class CopiedInstruction(CaptionReward):
    """Minus the share of the instruction that a caption repeats in one piece. Case does not count.

    Args:
        instruction: The question that the captioner gets with every image. Repeat here what the system asks.
        free: Number of words that a caption may share with it in one piece at no cost, as "of the image" happens by chance.

    Raises:
        ValueError: The instruction has no more than ``free`` words.
    """

    def __init__(self, instruction: str, free: NonNegativeInt = 3) -> None:
        self.instruction, self.free = instruction.casefold().split(), free
        if len(self.instruction) <= free:
            raise ValueError(
                f"instruction={instruction!r} has {len(self.instruction)} words, and {free} may be copied at no cost; lower "
                "the reward's init_args.free or set its init_args.instruction"
            )

    def score(self, text: str) -> float:
        """Minus the words of the longest common piece beyond ``free``, divided by those of the whole instruction beyond it."""
        words = text.casefold().split()
        piece = SequenceMatcher(None, self.instruction, words, autojunk=False).find_longest_match()
        return -float(max(0, piece.size - self.free) / (len(self.instruction) - self.free))


def _is_counted(character: str) -> bool:
    """Whether a character is a letter, a symbol that is neither currency nor mathematics, or no character at all."""
    category = unicodedata.category(character)
    return category[0] == "L" or category in ("So", "Co", "Cn", "Cs")


def _script(character: str) -> str:
    return unicodedata.name(character, "").partition(" ")[0]


def _known_scripts() -> set[str]:
    """The scripts of all letters of Unicode's first plane."""
    return {_script(chr(code)) for code in range(0x10000) if unicodedata.category(chr(code))[0] == "L"}
