"""The benchmark of the paper's claims: cases that are compared cost the same, and its intervals are Student's."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def claims():
    sys.path.insert(0, BENCHMARKS)
    try:
        import claims

        return claims
    finally:
        sys.path.remove(BENCHMARKS)


@pytest.mark.parametrize("family", ["tiny", "janus"])
def test_cases_that_are_compared_cost_the_same(claims, family):
    settings = claims.FAMILIES[family]
    cases = {case.name: case for case in settings.cases}

    def cost(name):
        case = cases[name]
        rates = {claims.CAPTIONS: 1.0, claims.JOINT: settings.joint_cost, claims.IMAGES: settings.image_cost}
        rate = rates[case.configs[0]]
        return case.steps * rate + (cost(case.after) if case.after else 0.0)

    whole = cost("captions, stage 3")
    for name in {"more captions", "joint", "images alone", "turn 4: images"} & set(cases):
        assert cost(name) == pytest.approx(whole, abs=4 * settings.joint_cost + 8), name
    assert all(case.steps % 4 == 0 for case in cases.values())


def test_a_run_comes_after_the_one_it_starts_from(claims):
    jobs = [claims.Job("tiny", case.name, 0) for case in claims.FAMILIES["tiny"].cases]
    seen = set()
    for wave in claims.waves(jobs):
        for job in wave:
            start = job.run.start
            assert start is None or start.folder in seen
        seen |= {job.run.folder for job in wave}
    assert len(seen) == len(jobs)


def test_intervals_and_differences(claims):
    from claims_table import differences, interval

    values = [0.1, 0.4, 0.2, 0.35, 0.3]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    scores = {"generation/overall": 0.0, "reconstruction/whole": 0.0, "unified_score/held_out": 0.0}
    measured = {
        "start": {"greedy": [{**scores, "reconstruction/whole": 0.1 * n} for n in range(3)]},
        "captions, stage 3": {"greedy": [{**scores, "reconstruction/whole": 0.1 * n + 0.5} for n in range(3)]},
    }
    lines = [line for line in differences(measured) if "right in everything" in line]
    assert lines == ["| captions, stage 3 | start | greedy | image right in everything | 3 | +0.500 ±0.000 | apart |"]
