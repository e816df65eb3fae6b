"""How often one system's captions are preferred to another's: by each judge, and by the panel."""

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
    """Everything that is said about a set of comparisons. Intervals are those of images drawn again.

    Args:
        comparisons: Of any pairs, by any judges.
        images: All names of images; the interval of every number draws from the same list.
        weight_RI: From `resample_weights`: how often each of them counts.
    """

    def __init__(self, comparisons: Sequence[Comparison], images: Sequence[str], weight_RI: np.ndarray) -> None:
        self.comparisons = [c for c in comparisons if c.score is not None]
        self.all, self.place = list(comparisons), {name: i for i, name in enumerate(images)}
        self.once_1I, self.weight_RI = np.ones((1, len(images))), weight_RI

    def of(self, *pair: str) -> WinRates:
        """Those of one pair of systems."""
        return WinRates([c for c in self.all if (c.a, c.b) == pair], list(self.place), self.weight_RI)

    def by(self, judges: Sequence[str]) -> WinRates:
        """Those of some judges."""
        return WinRates([c for c in self.all if c.judge in judges], list(self.place), self.weight_RI)

    @property
    def judges(self) -> list[str]:
        """Who gave at least one usable answer, in order of appearance."""
        return list(dict.fromkeys(c.judge for c in self.comparisons))

    @property
    def n(self) -> int:
        """How many images were compared."""
        return len({c.image for c in self.comparisons})

    def sums(self, value: Callable[[Comparison], float | None]) -> tuple[np.ndarray, np.ndarray]:
        """Per image: the sum of a value over comparisons, and how many there are."""
        total_I, cases_I = np.zeros(len(self.place)), np.zeros(len(self.place))
        for c in self.comparisons:
            total_I[self.place[c.image]] += value(c)
            cases_I[self.place[c.image]] += 1
        return total_I, cases_I

    def rates(self, weight_RI: np.ndarray) -> np.ndarray:
        """The panel's win rate of each resample, ``[R]``: the mean over judges of their means over images."""
        each = [ratio(*self.by([judge]).sums(lambda c: c.score), weight_RI) for judge in self.judges]
        return np.mean(each, axis=0)

    def rate(self) -> Interval:
        """The panel's win rate."""
        return interval(self.rates(self.once_1I)[0], self.rates(self.weight_RI))

    def equal_length(self) -> dict[str, float | int] | None:
        """The win rate at equal lengths, and the mean difference in words."""
        total_I, cases_I = self.sums(lambda c: c.score)
        difference_I = self.sums(lambda c: c.words_a - c.words_b)[0] / np.maximum(cases_I, 1)
        fits = [at_equal_length(total_I, cases_I, difference_I, w_RI) for w_RI in (self.once_1I, self.weight_RI)]
        found = interval(sigmoid(fits[0][0, 0]), sigmoid(fits[1][:, 0]))
        return {
            **score(found, self.n),
            "slope": float(fits[0][0, 1]),
            "words_more": float(np.average(difference_I, weights=cases_I)),
        }

    def majority(self) -> dict[str, float | int]:
        """Each image by the majority of judges: wins, losses, ties, their win rate and a sign test."""
        votes: dict[tuple[str, str, str], float] = {}
        for c in self.comparisons:
            votes[c.image, c.a, c.b] = votes.get((c.image, c.a, c.b), 0.0) + c.score - 0.5
        wins, losses = sum(vote > 0 for vote in votes.values()), sum(vote < 0 for vote in votes.values())
        rate = (wins + (len(votes) - wins - losses) / 2) / len(votes)
        ties = len(votes) - wins - losses
        return {"win_rate": rate, "wins": wins, "losses": losses, "ties": ties, "sign_p": sign_test(wins, losses)}

    def alpha(self) -> float | None:
        """How far judges agree: Krippendorff's alpha of their scores."""
        units: dict[tuple[str, str, str], list[float]] = {}
        for c in self.comparisons:
            units.setdefault((c.image, c.a, c.b), []).append(c.score)
        return krippendorff(units.values())

    def leave_one_out(self) -> list[float] | None:
        """The lowest and the highest win rate of panels with one judge less."""
        panels = [[name for name in self.judges if name != judge] for judge in self.judges]
        rates = [float(self.by(panel).rates(self.once_1I)[0]) for panel in panels if panel]
        return [min(rates), max(rates)] if rates else None

    def per_judge(self) -> dict[str, dict[str, Any]]:
        """`answer_counts` of every judge that was asked, with its win rate if it gave a usable answer."""
        found = {}
        for judge in dict.fromkeys(c.judge for c in self.all):
            own = self.by([judge])
            numbers = answer_counts(own.all)
            numbers["sign_p"] = sign_test(numbers["wins"], numbers["losses"])
            found[judge] = {**(score(own.rate(), own.n) if own.comparisons else {}), **numbers}
        return found


def pair_summary(rates: WinRates, strangers: Sequence[str]) -> dict[str, Any]:
    """All about one pair of systems.

    Args:
        rates: Of this pair.
        strangers: Judges of neither system's family.
    """
    if not rates.comparisons:
        return {"judges": rates.per_judge()}
    outside = rates.by(strangers)
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
    """The mean win rate over rivals, each equally weighted, whatever it lacks."""
    values = [rate.rates(rate.once_1I)[0] for rate in rates]
    resampled_R = np.mean([rate.rates(rate.weight_RI) for rate in rates], axis=0)
    return score(interval(float(np.mean(values)), resampled_R), len({c.image for rate in rates for c in rate.comparisons}))


def elo(rates: WinRates, systems: Sequence[str]) -> dict[str, Score]:
    """Bradley-Terry strengths of all systems as Elo points about zero; each image's comparisons are drawn together.

    Raises:
        ValueError: Some were never compared, not even through others.
    """
    place = {name: i for i, name in enumerate(systems)}
    wins_ISS = np.zeros((len(rates.place), len(systems), len(systems)))
    for c in rates.comparisons:
        i, a, b = rates.place[c.image], place[c.a], place[c.b]
        wins_ISS[i, a, b] += c.score
        wins_ISS[i, b, a] += 1 - c.score
    found_RS = [ELO * strengths(np.tensordot(weight_RI, wins_ISS, 1)) for weight_RI in (rates.once_1I, rates.weight_RI)]
    intervals = [interval(found_RS[0][0, s], found_RS[1][:, s]) for s in range(len(systems))]
    return {name: score(found, rates.n) for name, found in zip(systems, intervals, strict=True)}


def judges_of_other_families(judges: Mapping[str, str], families: Mapping[str, str], pair: Sequence[str]) -> list[str]:
    """Judges that trained neither system of a pair.

    Args:
        judges: Name to family.
        families: System to family, for systems that have one.
        pair: Two systems.
    """
    own = {families[system] for system in pair if system in families}
    return [name for name, family in judges.items() if family not in own]
