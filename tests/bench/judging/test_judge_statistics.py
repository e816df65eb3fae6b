"""Win rates and what is said about them, against plain loops and planted truths."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from uae.bench.judging.statistics.agreement import krippendorff
from uae.bench.judging.statistics.bradley_terry import ELO, VIRTUAL, strengths
from uae.bench.judging.statistics.comparisons import Comparison, answer_counts
from uae.bench.judging.statistics.length_control import PRIOR, at_equal_length, sigmoid
from uae.bench.judging.statistics.resampling import resample_weights
from uae.bench.judging.statistics.win_rates import WinRates, elo, judges_of_other_families, mean_rate, pair_summary
from uae.bench.paired import sign_test
from uae.metrics.intervals import bootstrap

ANSWERS = ("first", "second", "tie", "invalid", None)


def compare(ab, ba, image="i", judge="j", a="A", b="B", words=(5, 5)):
    return Comparison(image, a, b, judge, *words, ab, ba)


def panel(images=30, judges="xyz", rivals="BC", seed=0, answers=ANSWERS):
    """Random answers, of all kinds."""
    draw = np.random.default_rng(seed)
    cases = itertools.product(range(images), judges, rivals)
    return [
        compare(draw.choice(answers), draw.choice(answers), f"{i:03d}", j, b=b, words=(int(draw.integers(3, 9)), 5))
        for i, j, b in cases
    ]


def rates_of(comparisons, resamples=200):
    images = sorted({c.image for c in comparisons})
    return WinRates(comparisons, images, resample_weights(len(images), resamples, 0))


def reference_score(ab, ba):
    """The rule as it is written: a wins both orders, b wins both, else half; both invalid or one missing is nothing."""
    if ab is None or ba is None or (ab == "invalid" and ba == "invalid"):
        return None
    if ab == "first" and ba == "second":
        return 1.0
    if ab == "second" and ba == "first":
        return 0.0
    return 0.5


@pytest.mark.parametrize(("ab", "ba"), list(itertools.product(ANSWERS, ANSWERS)))
def test_a_pairs_score(ab, ba):
    assert compare(ab, ba).score == reference_score(ab, ba)
    mirrored = compare(ba, ab).score  # the same answers, had a been called b
    if mirrored is not None:
        assert mirrored == 1 - compare(ab, ba).score


def test_counts_are_those_of_a_plain_loop():
    given = panel()
    found = answer_counts(given)
    n = wins = changed = both = firsts = seconds = answered = invalid = 0
    for c in given:
        score = reference_score(c.ab, c.ba)
        n, wins = n + (score is not None), wins + (score == 1.0)
        if c.ab in ("first", "second", "tie") and c.ba in ("first", "second", "tie"):
            both += 1
            changed += (c.ab, c.ba) not in (("first", "second"), ("second", "first"), ("tie", "tie"))
        for answer in (c.ab, c.ba):
            answered += answer is not None
            invalid += answer == "invalid"
            firsts += answer == "first"
            seconds += answer == "second"
    assert (found["n"], found["wins"]) == (n, wins)
    assert found["wins"] + found["losses"] + found["ties"] == n
    assert found["inconsistency"] == changed / both
    assert found["first_position_bias"] == firsts / (firsts + seconds) - 0.5
    assert found["invalid"] == invalid / answered
    assert found["flagged"]
    few = [compare("first", "second")] * 19 + [compare("invalid", "second")]
    assert not answer_counts(few)["flagged"]
    assert answer_counts([*few, *few, compare("invalid", "invalid")] + [compare("invalid", "tie")] * 2)["flagged"]


def test_a_judge_of_positions_alone_says_nothing():
    rates = rates_of([compare("first", "first", f"{i}") for i in range(40)])
    summary = pair_summary(rates, ["j"])
    assert summary["panel"] == {"value": 0.5, "n": 40, "low": 0.5, "high": 0.5}
    own = summary["judges"]["j"]
    assert (own["inconsistency"], own["first_position_bias"], own["ties"]) == (1.0, 0.5, 40)
    assert summary["equal_length"]["value"] == pytest.approx(0.5)


def test_the_panel_is_the_mean_over_judges_of_their_means():
    given = panel()
    per_judge = {}
    for judge in "xyz":
        scores = [reference_score(c.ab, c.ba) for c in given if c.judge == judge and c.b == "B"]
        scores = [score for score in scores if score is not None]
        per_judge[judge] = sum(scores) / len(scores)
    summary = pair_summary(rates_of(given).of("A", "B"), ["x", "z"])
    assert {judge: own["value"] for judge, own in summary["judges"].items()} == pytest.approx(per_judge)
    assert summary["panel"]["value"] == pytest.approx(sum(per_judge.values()) / 3)
    pairs = [(per_judge[a] + per_judge[b]) / 2 for a, b in ("xy", "xz", "yz")]
    assert summary["leave_one_judge_out"] == pytest.approx([min(pairs), max(pairs)])
    assert summary["without_own_family"]["value"] == pytest.approx((per_judge["x"] + per_judge["z"]) / 2)
    votes = Counter()
    for c in given:
        if c.b == "B" and reference_score(c.ab, c.ba) is not None:
            votes[c.image] += reference_score(c.ab, c.ba) - 0.5
    majority = [1.0 if vote > 0 else 0.0 if vote < 0 else 0.5 for vote in votes.values()]
    assert summary["majority"]["win_rate"] == pytest.approx(sum(majority) / len(majority))
    assert summary["majority"]["wins"] == majority.count(1.0)


def test_headlines_weigh_rivals_equally():
    given = [compare("first", "second", f"{i}", b="B") for i in range(9)] + [compare("second", "first", "0", b="C")]
    rates = rates_of(given)
    assert mean_rate([rates.of("A", "B"), rates.of("A", "C")])["value"] == 0.5


def test_judges_of_a_systems_family_are_strangers_to_others_only():
    judges, families = {"gpt": "openai", "mini": "openai", "claude": "anthropic"}, {"B": "openai"}
    assert judges_of_other_families(judges, families, ("A", "B")) == ["claude"]
    assert judges_of_other_families(judges, families, ("A", "C")) == ["gpt", "mini", "claude"]
    assert judges_of_other_families(judges, families, ("B", "A")) == ["claude"]


def test_intervals_draw_images_with_all_their_answers():
    given = [c for c in panel(judges="x", rivals="B") if c.score is not None]
    found = rates_of(given, 1000).rate()
    expected = bootstrap(np.array([c.score for c in given]), 1000, 0, np.array([c.image for c in given]))
    assert found == pytest.approx(expected)
    tripled = [Comparison(c.image, c.a, c.b, judge, 5, 5, c.ab, c.ba) for c in given for judge in "xyz"]
    assert rates_of(tripled, 1000).rate() == pytest.approx(found)  # equal judges add no certainty


def test_agreement_is_krippendorffs_by_definition():
    draw = np.random.default_rng(1)
    units = [list(draw.choice([0, 0.5, 1], size=draw.integers(0, 5))) for _ in range(40)]
    pairs = [(a, b, len(u) - 1) for u in units if len(u) > 1 for i, a in enumerate(u) for j, b in enumerate(u) if i != j]
    pooled = [value for u in units if len(u) > 1 for value in u]
    observed = sum((a - b) ** 2 / others for a, b, others in pairs) / len(pooled)
    everyone = [(a - b) ** 2 for i, a in enumerate(pooled) for j, b in enumerate(pooled) if i != j]
    assert krippendorff(units) == pytest.approx(1 - observed / (sum(everyone) / len(everyone)))
    assert krippendorff([[1, 1, 1], [0, 0], [0.5, 0.5]]) == 1
    assert krippendorff([[1, 0], [1, 0]]) < 0
    assert krippendorff([[1, 1], [1, 1]]) is None
    assert krippendorff([[1], []]) is None


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (9, 1), (3, 11), (600, 400)])
def test_the_sign_test_counts_splits_as_uneven(wins, losses):
    n = wins + losses
    uneven = [k for k in range(n + 1) if abs(2 * k - n) >= abs(wins - losses)]
    assert sign_test(wins, losses) == pytest.approx(sum(math.comb(n, k) for k in uneven) / 2**n)


def round_robin(theta, games, seed=0):
    """Wins of every pair."""
    draw, wins = np.random.default_rng(seed), np.zeros((1, len(theta), len(theta)))
    for a, b in itertools.combinations(range(len(theta)), 2):
        wins[0, a, b] = draw.binomial(games, 1 / (1 + math.exp(theta[b] - theta[a])))
        wins[0, b, a] = games - wins[0, a, b]
    return wins


def test_bradley_terry_recovers_planted_strengths():
    theta = np.array([1.5, 0.4, -0.2, -0.5, -1.2])
    found = strengths(round_robin(theta, 20000))[0]
    assert found.sum() == pytest.approx(0, abs=1e-9)
    assert found == pytest.approx(theta, abs=0.03)


def test_bradley_terry_is_the_maximum_of_its_likelihood():
    """By gradient ascent, in plain loops."""
    wins = round_robin([0.8, 0.0, -0.8], 12)[0]
    wins[0, 2] = wins[2, 0] = 0  # compared through the second alone
    theta = [0.0, 0.0, 0.0]
    for _ in range(5000):
        slope = [0.0, 0.0, 0.0]
        for a, b in ((0, 1), (1, 0), (1, 2), (2, 1)):
            won, lost = wins[a, b] + VIRTUAL, wins[b, a] + VIRTUAL
            slope[a] += won - (won + lost) / (1 + math.exp(theta[b] - theta[a]))
        theta = [value + 0.05 * up for value, up in zip(theta, slope, strict=True)]
    assert strengths(wins[None])[0] == pytest.approx(np.array(theta) - np.mean(theta), abs=1e-6)


def test_bradley_terry_under_separation_and_without_a_bridge():
    always = np.zeros((1, 3, 3))
    always[0, 0, 1] = always[0, 1, 2] = always[0, 0, 2] = 50
    found = strengths(always)[0]
    assert np.isfinite(found).all()
    assert found[0] > found[1] > found[2]
    islands = np.zeros((1, 4, 4))
    islands[0, 0, 1] = islands[0, 2, 3] = islands[0, 3, 2] = 5
    with pytest.raises(ValueError, match="never compared"):
        strengths(islands)


def test_elo_orders_systems_and_says_how_surely():
    theta = {"A": 1.0, "B": 0.0, "C": -1.0}
    draw, given = np.random.default_rng(3), []
    for i, (a, b) in itertools.product(range(400), itertools.combinations(theta, 2)):
        win = draw.random() < 1 / (1 + math.exp(theta[b] - theta[a]))
        given.append(compare(*(("first", "second") if win else ("second", "first")), f"{i}", a=a, b=b))
    found = elo(rates_of(given), list(theta))
    for name, strength in theta.items():
        assert found[name]["low"] < ELO * strength < found[name]["high"]
        assert 10 < found[name]["high"] - found[name]["low"] < 80
    assert sum(one["value"] for one in found.values()) == pytest.approx(0, abs=1e-6)
    assert found["A"]["value"] - found["B"]["value"] == pytest.approx(400 * math.log10(math.e), rel=0.2)


def test_length_control_finds_the_rate_at_equal_lengths():
    """Captions of b are worse and longer, and the judge likes length."""
    draw, images, spread = np.random.default_rng(0), 40000, 10.0
    difference = draw.normal(-8, 6, images).round()
    wins = draw.random(images) < sigmoid(0.7 + 1.2 * difference / spread)
    found = at_equal_length(wins.astype(float), np.ones(images), difference, np.ones((1, images)))[0]
    assert wins.mean() < 0.5
    assert found[0] == pytest.approx(0.7, abs=0.06)
    assert found[1] == pytest.approx(1.2 * math.sqrt((difference**2).mean()) / spread, abs=0.06)


def test_length_control_is_the_maximum_of_its_posterior():
    """By gradient ascent, in plain loops; images with several answers, some without."""
    draw = np.random.default_rng(2)
    cases, difference = draw.integers(0, 4, 25), draw.integers(-9, 15, 25)
    total = np.array([draw.choice([0, 0.5, 1], n).sum() for n in cases])
    spread = math.sqrt(sum(n * d**2 for n, d in zip(cases, difference, strict=True)) / cases.sum())
    b0 = b1 = 0.0
    for _ in range(4000):
        up0, up1 = 0.5 - 1 / (1 + math.exp(-b0)), -PRIOR * b1
        for won, n, d in zip(total, cases, difference, strict=True):
            residual = won - n / (1 + math.exp(-b0 - b1 * d / spread))
            up0, up1 = up0 + residual, up1 + residual * d / spread
        b0, b1 = b0 + 0.02 * up0, b1 + 0.02 * up1
    found = at_equal_length(total, cases.astype(float), difference.astype(float), np.ones((1, 25)))[0]
    assert found == pytest.approx([b0, b1], abs=1e-6)


@pytest.mark.parametrize("difference", [0.0, 7.0])
def test_length_control_is_finite_when_all_is_won(difference):
    found = at_equal_length(np.ones(30), np.ones(30), np.full(30, difference), np.ones((2, 30)))
    assert np.isfinite(found).all()
    assert 0.5 < sigmoid(found[0, 0]) < 1
