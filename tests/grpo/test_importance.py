"""Importance weights against plain loops, and what they say about themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from uae.grpo import Correction, effective_sample_size, entropy_threshold, importance_weights

from . import reference

RANGES = [(0.0, 2.0), (0.5, 1.2), (0.9, 1.05), (1.0, math.inf)]


@pytest.mark.parametrize(("level", "mode", "limits"), list(itertools.product(["token", "sequence"], ["truncate", "mask"], RANGES)))
def test_weights_match_loops(level, mode, limits):
    for seed in range(3):
        case = reference.random_case(seed, empty_row=seed == 1)
        logp, old, _, mask, _ = case.tensors()
        arguments = case.old, case.logp, case.mask, level
        expected = torch.tensor(reference.importance_weights(*arguments, mode, *limits), dtype=torch.float64)
        junk = old.masked_fill(mask == 0, math.nan)
        weights = importance_weights(junk, logp, mask, level, mode, *limits)
        assert_close(weights, expected, atol=1e-12, rtol=0)
        assert not weights.requires_grad
        free = torch.tensor(reference.importance_weights(*arguments, "truncate", 0, math.inf))
        outside = ((free < limits[0]) | (free > limits[1])) & (mask == 1)
        limited = Correction(level, mode, *limits).limited(junk, logp, mask)
        assert limited.item() == pytest.approx(outside.sum().item() / mask.sum().item())
        assert limits[1] > 1.3 or level == "sequence" or outside.any()


def test_a_sampler_that_agrees_needs_no_correction():
    logp, _, _, mask, _ = reference.random_case(0).tensors()
    for level, mode in itertools.product(["token", "sequence"], ["truncate", "mask"]):
        assert torch.equal(importance_weights(logp, logp, mask, level, mode, 1.0, 1.0), mask)


def test_a_long_row_is_not_masked_for_its_length():
    """The geometric mean: with a gap of the same size at every token, rows of 4 and of 400 tokens have one weight."""
    short, long = (
        importance_weights(torch.zeros(1, tokens), torch.full((1, tokens), 0.02), torch.ones(1, tokens), "sequence", "mask", 0.5, 1.5)
        for tokens in (4, 400)
    )
    assert_close(short[0, 0], long[0, 0])
    assert long[0, 0] > 1


def test_effective_sample_size():
    ones = torch.ones(2, 4)
    assert effective_sample_size(3 * ones, ones).item() == pytest.approx(1)
    one_of_eight = torch.zeros(2, 4)
    one_of_eight[1, 2] = 5.0
    assert effective_sample_size(one_of_eight, ones).item() == pytest.approx(1 / 8)
    mask = torch.tensor([[1.0, 1, 0, 0]])
    assert effective_sample_size(torch.tensor([[1.0, 3, math.nan, 9]]), mask).item() == pytest.approx(16 / (2 * 10))
    assert effective_sample_size(ones, 0 * ones).item() == 0


@pytest.mark.parametrize("share", [1.0, 0.8, 0.35, 0.01])
def test_entropy_threshold_is_a_quantile(share):
    case = reference.random_case(5, rows=9)
    _, entropy = case.extras()
    mask = torch.tensor(case.mask)
    inside = [value for row, marks in zip(case.entropy, case.mask, strict=True) for value, m in zip(row, marks, strict=True) if m]
    threshold = entropy_threshold(entropy.masked_fill(mask == 0, math.nan), mask, share)
    assert threshold.item() == pytest.approx(reference.quantile(inside, 1 - share), abs=1e-12)
    assert entropy_threshold(entropy, 0 * mask, share) == math.inf


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": "row"}, "correction.level='row'; allowed: token, sequence"),
        ({"mode": "clip"}, "correction.mode='clip'; allowed: truncate, mask"),
        ({"high": 0.9}, r"correction\.low=0\.0 and model\.init_args\.correction\.high=0\.9; allowed: 0 <= low <= 1 <= high"),
        ({"low": 1.1}, r"correction\.low=1\.1"),
        ({"low": math.nan}, r"correction\.low=nan"),
    ],
)
def test_bad_settings_are_one_line_errors(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        Correction(**settings)
    assert "\n" not in str(error.value)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"shapes \[1, 2\], \[1, 3\] and \[1, 3\]; allowed: one shape"):
        importance_weights(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 3))
