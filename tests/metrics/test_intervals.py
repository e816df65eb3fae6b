import math

import numpy as np
import pytest

from uae.metrics.intervals import bootstrap, mean_of_means, wilson


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(0)
    intervals = [bootstrap(draw.exponential(size=80), 300, seed) for seed in range(300)]
    covered = np.mean([low <= 1 <= high for _, low, high in intervals])
    assert 0.89 < covered < 0.98  # 95 % less the skew of the exponential
    assert all(low < value < high for value, low, high in intervals)


def test_cases_of_a_cluster_are_one_case():
    values = np.random.default_rng(1).normal(size=50)
    copies, clusters = np.repeat(values, 40), np.repeat(np.arange(50), 40)
    once, ignored = bootstrap(values), bootstrap(copies)
    assert bootstrap(copies, clusters_N=clusters) == pytest.approx(once)
    assert ignored.high - ignored.low < (once.high - once.low) / 4  # what clustering prevents
    names = np.array([f"image {i}" for i in clusters])
    assert bootstrap(copies, clusters_N=names).value == pytest.approx(values.mean())


def test_equal_seeds_pair_the_resamples():
    a, noise = np.random.default_rng(2).normal(size=(2, 60))
    shifted, unpaired = bootstrap(a + 1), bootstrap(a + noise)
    assert shifted.low - bootstrap(a).low == pytest.approx(1)
    assert unpaired.low - bootstrap(a).low != pytest.approx(0)


def test_wilson_known_values():
    assert wilson(1, 20) == pytest.approx((0.05, 0.00888, 0.23613), abs=1e-4)
    assert wilson(9, 20) == pytest.approx((0.45, 0.25816, 0.65792), abs=1e-4)
    assert wilson(0, 10).low == 0
    assert wilson(10, 10).high == pytest.approx(1)
    assert math.isnan(wilson(0, 0).value)
    assert wilson(0, 0)[1:] == (0, 1)


def test_the_mean_of_means_weighs_groups_and_not_cases():
    draw = np.random.default_rng(3)
    small, large = draw.normal(1, 1, size=20), draw.normal(0, 1, size=2000)
    both = mean_of_means([(small, np.arange(20)), (large, np.arange(2000))], resamples=4000)
    assert both.value == pytest.approx((small.mean() + large.mean()) / 2)
    deviation = np.sqrt(small.var() / 20 + large.var() / 2000) / 2  # of independent means
    assert both.high - both.low == pytest.approx(2 * 1.96 * deviation, rel=0.07)
    assert mean_of_means([(small, np.arange(20))]) == pytest.approx(bootstrap(small, clusters_N=np.arange(20)))
