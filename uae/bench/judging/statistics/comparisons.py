"""One judge's two answers about a pair of captions, one for each order of the captions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

INVALID = "invalid"
SHARE_OF_A = {"ab": {"first": 1.0, "second": 0.0, "tie": 0.5}, "ba": {"first": 0.0, "second": 1.0, "tie": 0.5}}


@dataclass(frozen=True)
class Comparison:
    """System ``a`` against system ``b`` on one image, by one judge.

    Args:
        image: Name of the image.
        a: Name of one system.
        b: Name of the other system.
        judge: Name of the judge.
        words_a: Number of words of a's caption.
        words_b: Number of words of b's caption.
        ab: Answer when a's caption came first: "first", "second", "tie", "invalid", or None if there is none.
        ba: Answer when b's caption came first.
    """

    image: str
    a: str
    b: str
    judge: str
    words_a: int
    words_b: int
    ab: str | None
    ba: str | None

    @property
    def shares(self) -> list[float]:
        """For each valid answer 1 if it prefers a, 0 if it prefers b, 1/2 for a tie."""
        answers = (("ab", self.ab), ("ba", self.ba))
        return [SHARE_OF_A[order][answer] for order, answer in answers if answer is not None and answer != INVALID]

    @property
    def score(self) -> float | None:
        """1 if a wins in both orders, 0 if b does, else 1/2; None if an answer is missing or both are invalid.

        An invalid answer counts as half a win for its order: it can only turn a win into a tie.
        """
        if None in (self.ab, self.ba) or not self.shares:
            return None
        if len(self.shares) == 2 and self.shares[0] == self.shares[1]:
            return self.shares[0]
        return 0.5

    @property
    def inconsistent(self) -> bool | None:
        """Whether the answer depends on the order of the captions; None unless both answers are valid."""
        return self.shares[0] != self.shares[1] if len(self.shares) == 2 else None


class AnswerCounts(TypedDict):
    """How a judge answered, and how reliable it is.

    ``n`` is the number of usable comparisons; ``inconsistency`` the share of pairs whose answer depends on the order of the
    captions; ``first_position_bias`` the share of decisive answers for the caption that came first, minus 1/2; ``invalid`` the share
    of answers that cannot be read, ``flagged`` above 5 %. ``missing`` counts comparisons without one of the two answers.
    """

    n: int
    wins: int
    losses: int
    ties: int
    inconsistency: float | None
    first_position_bias: float | None
    invalid: float
    flagged: bool
    both_invalid: int
    missing: int


def answer_counts(comparisons: Iterable[Comparison]) -> AnswerCounts:
    """Count the answers of one judge."""
    given = list(comparisons)
    answers = [answer for c in given for answer in (c.ab, c.ba) if answer is not None]
    decisive = [answer for answer in answers if answer in ("first", "second")]
    scores = [c.score for c in given if c.score is not None]
    changed = [c.inconsistent for c in given if c.inconsistent is not None]
    invalid = answers.count(INVALID) / len(answers) if answers else 0.0
    return {
        "n": len(scores),
        "wins": scores.count(1.0),
        "losses": scores.count(0.0),
        "ties": scores.count(0.5),
        "inconsistency": sum(changed) / len(changed) if changed else None,
        "first_position_bias": decisive.count("first") / len(decisive) - 0.5 if decisive else None,
        "invalid": invalid,
        "flagged": invalid > 0.05,
        "both_invalid": sum(c.ab == c.ba == INVALID for c in given),
        "missing": sum(None in (c.ab, c.ba) for c in given),
    }
