"""Images drawn again: how often each image counts in each resample. All answers about an image are drawn together."""

from __future__ import annotations

import numpy as np

from uae.metrics.intervals import LEVEL, Interval


def resample_weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image was drawn, ``[R, I]``; the draws of `uae.metrics.intervals.bootstrap` with the same seed."""
    draw, weight_RI = np.random.default_rng(seed), np.empty((resamples, images))
    for row_I in weight_RI:
        row_I[:] = np.bincount(draw.integers(images, size=images), minlength=images)
    return weight_RI


def interval(value: float, resampled_R: np.ndarray) -> Interval:
    """A value with the 95 % interval of its resamples; those without a single case are left out."""
    low, high = np.nanquantile(resampled_R, LEVEL)
    return Interval(float(value), float(low), float(high))


def ratio(total_I: np.ndarray, cases_I: np.ndarray, weight_RI: np.ndarray) -> np.ndarray:
    """The mean of the cases of each resample, ``[R]``; NaN where there are none.

    Args:
        total_I: Sum over an image's cases.
        cases_I: How many they are.
        weight_RI: See `resample_weights`.
    """
    cases_R = weight_RI @ cases_I
    return np.divide(weight_RI @ total_I, cases_R, out=np.full(len(cases_R), np.nan), where=cases_R > 0)
