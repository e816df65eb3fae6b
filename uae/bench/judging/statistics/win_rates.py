"""Win rates: how often one system's captions are preferred to another's, by each judge and by the panel of all judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from uae.bench.judging.statistics.agreement import krippendorff
from uae.bench.judging.statistics.bradley_terry import ELO, strengths
from uae.bench.judging.statistics.comparisons import Comparison, answer_counts
from uae.bench.judging.statistics.length_control import at_equal_length, sigmoid
from uae.bench.judging.statistics.resampling import interval, ratio
from uae.bench.paired import sign_test
from uae.bench.result import Score, score
from uae.metrics.intervals import Interval


class WinRates:
    """Statistics of a set of comparisons, with bootstrap intervals over images.

    Args:
        comparisons: Comparisons of any pairs of systems by any judges.
        images: Names of all images; every interval draws from this list.
        weight_RI: How often each image counts in each resample, see `resample_weights`.
    """

    def __init__(self, comparisons: Sequence[Comparison], images: Sequence[str], weight_RI: np.ndarray) -> None:
        self.comparisons = [c for c in comparisons if c.score is not None]
        self.all, self.place = list(comparisons), {name: i for i, name in enumerate(images)}
        self.once_1I, self.weight_RI = np.ones((1, len(images))), weight_RI

    def of(self, *pair: str) -> WinRates:
        """The statistics of one pair of systems."""
        return WinRates([c for c in self.all if (c.a, c.b) == pair], list(self.place), self.weight_RI)

    def by(self, judges: Sequence[str]) -> WinRates:
        """The statistics of some judges."""
        return WinRates([c for c in self.all if c.judge in judges], list(self.place), self.weight_RI)

    @property
    def judges(self) -> list[str]:
        """Judges that gave at least one usable answer, in order of appearance."""
        return list(dict.fromkeys(c.judge for c in self.comparisons))

    @property
    def n(self) -> int:
        """Number of images with a usable comparison."""
        return len({c.image for c in self.comparisons})

    def sums(self, value: Callable[[Comparison], float]) -> tuple[np.ndarray, np.ndarray]:
        """Sum of a value over each image's comparisons and number of these comparisons, ``[I]`` each."""
        total_I, cases_I = np.zeros(len(self.place)), np.zeros(len(self.place))
        for c in self.comparisons:
            total_I[self.place[c.image]] += value(c)
            cases_I[self.place[c.image]] += 1
        return total_I, cases_I

    def rates(self, weight_RI: np.ndarray) -> np.ndarray:
        """The panel's win rate in each resample, ``[R]``: the mean over judges of their means over images."""
        each = [ratio(*self.by([judge]).sums(_score), weight_RI) for judge in self.judges]
        return np.asarray(np.mean(each, axis=0))

    def rate(self) -> Interval:
        """The panel's win rate with its interval."""
        return interval(self.rates(self.once_1I)[0], self.rates(self.weight_RI))

    def equal_length(self) -> dict[str, Any]:
        """The win rate as it would be between captions of equal length, the slope per word, and the mean difference in words."""
        total_I, cases_I = self.sums(_score)
        difference_I = self.sums(lambda c: c.words_a - c.words_b)[0] / np.maximum(cases_I, 1)
        fits = [at_equal_length(total_I, cases_I, difference_I, w_RI) for w_RI in (self.once_1I, self.weight_RI)]
        found = interval(float(sigmoid(fits[0][0, 0])), sigmoid(fits[1][:, 0]))
        return {
            **score(found, self.n),
            "slope": float(fits[0][0, 1]),
            "words_more": float(np.average(difference_I, weights=cases_I)),
        }

    def majority(self) -> dict[str, float | int]:
        """Wins, losses and ties when the majority of judges decides each image, with their win rate and the p-value of a sign test."""
        votes: dict[tuple[str, str, str], float] = {}
        for c in self.comparisons:
            votes[c.image, c.a, c.b] = votes.get((c.image, c.a, c.b), 0.0) + _score(c) - 0.5
        wins, losses = sum(vote > 0 for vote in votes.values()), sum(vote < 0 for vote in votes.values())
        rate = (wins + (len(votes) - wins - losses) / 2) / len(votes)
        ties = len(votes) - wins - losses
        return {"win_rate": rate, "wins": wins, "losses": losses, "ties": ties, "sign_p": sign_test(wins, losses)}

    def alpha(self) -> float | None:
        """Krippendorff's alpha of the judges' scores, see `krippendorff`."""
        units: dict[tuple[str, str, str], list[float]] = {}
        for c in self.comparisons:
            units.setdefault((c.image, c.a, c.b), []).append(_score(c))
        return krippendorff(units.values())

    def leave_one_out(self) -> list[float] | None:
        """The lowest and the highest win rate of the panels that lack one judge; None with a single judge."""
        panels = [[name for name in self.judges if name != judge] for judge in self.judges]
        rates = [float(self.by(panel).rates(self.once_1I)[0]) for panel in panels if panel]
        return [min(rates), max(rates)] if rates else None

    def per_judge(self) -> dict[str, dict[str, Any]]:
        """`answer_counts` of every judge that was asked, with the judge's win rate if there is a usable answer."""
        found = {}
        for judge in dict.fromkeys(c.judge for c in self.all):
            own = self.by([judge])
            counts = answer_counts(own.all)
            rate: Score = score(own.rate(), own.n) if own.comparisons else {}
            found[judge] = {**rate, **counts, "sign_p": sign_test(counts["wins"], counts["losses"])}
        return found


def _score(comparison: Comparison) -> float:
    """The score of a usable comparison."""
    assert comparison.score is not None
    return comparison.score


def pair_summary(rates: WinRates, outsiders: Sequence[str]) -> dict[str, Any]:
    """Everything that a result says about one pair of systems.

    Args:
        rates: Statistics of this pair.
        outsiders: Judges of neither system's model family.
    """
    if not rates.comparisons:
        return {"judges": rates.per_judge()}
    outside = rates.by(outsiders)
    return {
        "panel": score(rates.rate(), rates.n),
        "majority": rates.majority(),
        "equal_length": rates.equal_length(),
        "without_own_family": score(outside.rate(), outside.n) if outside.comparisons else None,
        "agreement": rates.alpha(),
        "leave_one_judge_out": rates.leave_one_out(),
        "judges": rates.per_judge(),
    }


def mean_rate(rates: Sequence[WinRates]) -> Score:
    """The mean of several pairs' win rates, each pair weighted equally however many comparisons it has."""
    values = [rate.rates(rate.once_1I)[0] for rate in rates]
    resampled_R = np.mean([rate.rates(rate.weight_RI) for rate in rates], axis=0)
    return score(interval(float(np.mean(values)), resampled_R), len({c.image for rate in rates for c in rate.comparisons}))


def elo(rates: WinRates, systems: Sequence[str]) -> dict[str, Score]:
    """Bradley-Terry strengths of all systems as Elo points with mean zero; an image's comparisons are resampled together.

    Raises:
        ValueError: The comparisons do not connect all systems.
    """
    place = {name: i for i, name in enumerate(systems)}
    wins_ISS = np.zeros((len(rates.place), len(systems), len(systems)))
    for c in rates.comparisons:
        i, a, b = rates.place[c.image], place[c.a], place[c.b]
        wins_ISS[i, a, b] += _score(c)
        wins_ISS[i, b, a] += 1 - _score(c)
    found_RS = [ELO * strengths(np.tensordot(weight_RI, wins_ISS, 1)) for weight_RI in (rates.once_1I, rates.weight_RI)]
    intervals = [interval(found_RS[0][0, s], found_RS[1][:, s]) for s in range(len(systems))]
    return {name: score(found, rates.n) for name, found in zip(systems, intervals, strict=True)}


def judges_of_other_families(judges: Mapping[str, str], families: Mapping[str, str], pair: Sequence[str]) -> list[str]:
    """Judges whose model family is that of neither system of a pair.

    Args:
        judges: Name of each judge to its family.
        families: System to the family of its model, for systems that have one.
        pair: Names of two systems.
    """
    own = {families[system] for system in pair if system in families}
    return [name for name, family in judges.items() if family not in own]
