"""What a model answered: the letter it chose, or the word or number it gave. Nothing is guessed: no answer is no answer.

The rules are those of MMMU's evaluation, told in our own words, without its draw at random where nothing is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

LONG = 5  # words; in longer answers an option's text may stand anywhere
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER = re.compile(r"-?\b\d{1,3}(?:,\d{3})+(?:\.\d+)?\b|-?(?:\d+\.\d+|\.\d+|\d+)(?:[eE][+-]?\d+)?")


def choice(said: str, options: Mapping[str, str]) -> str | None:
    """The letter an answer chooses, or None.

    The first of these that finds anything decides, and where it finds several letters, the one named last:

    1. a bracketed letter, ``(B)``
    2. a letter that stands alone, ``B`` or ``the answer is B because``
    3. a letter with a full stop, ``B. a dog``
    4. the text of an option: anywhere in an answer of more than five words, alone in a shorter one

    Args:
        said: The answer.
        options: Letter to text. Texts may be empty.
    """
    text = f" {said.strip(' ,.!?;:' + chr(39)).strip()} "
    letters = list(options)
    rules: Sequence[Callable[[str], int]] = (
        lambda letter: text.rfind(f"({letter})"),
        lambda letter: text.rfind(f" {letter} "),
        lambda letter: _last(rf"(?<!\w){letter}\.", text),
        lambda letter: _text(options[letter], text),
    )
    for rule in rules:
        found = {letter: place for letter in letters if (place := rule(letter)) >= 0}
        if found:
            return max(found, key=lambda letter: found[letter])
    return None


def _last(pattern: str, text: str) -> int:
    return max((match.start() for match in re.finditer(pattern, text)), default=-1)


def _text(option: str, text: str) -> int:
    """Where an option's text stands in an answer, -1 for nowhere."""
    option, text = option.strip().lower(), text.lower()
    if not option:
        return -1
    if len(text.split()) > LONG:
        return text.rfind(option)
    return 0 if text.strip() == option.strip(" .") else -1


def open_answer(said: str, truths: Sequence[str]) -> bool:
    """Whether an answer to an open question gives one of the true answers.

    The parts of the answer behind "is", "so", "therefore" and the like (the shortest in each line; in the last also behind
    "="), or all of it, are compared: numbers rounded to two decimals, words by containment, case aside.
    """
    claims: set[str | float] = set()
    for part in _key_parts(said):
        claims |= set(_normal(part))
        for number in _NUMBER.findall(part):
            claims |= set(_normal(number))
    wanted = [form for truth in truths for form in _normal(str(truth))]
    return any(
        form in claim if isinstance(form, str) and isinstance(claim, str) else form == claim
        for form in wanted
        for claim in claims
    )


def _key_parts(said: str) -> list[str]:
    parts = said.strip().strip(".").split("\n")
    found = []
    for place, part in enumerate(parts):
        keys = (*_KEYS, "=") if place + 1 == len(parts) else _KEYS
        tails = [part.lower().rsplit(key, 1)[1].strip() for key in keys if key in part.lower()]
        shortest = min(filter(None, tails), key=len, default="")  # "paris " ends in a key
        if shortest.strip(" :,.!?;'"):
            found.append(shortest)
    return found or [said.strip().strip(".").lower()]


def _normal(text: str) -> list[str | float]:
    """A number to two decimals, or lower case; a single letter only with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text] if text else []
