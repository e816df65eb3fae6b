"""The bootstrap over images: all answers about an image are resampled together."""

from __future__ import annotations

import numpy as np

from uae.metrics.intervals import LEVEL, Interval


def resample_weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image is drawn in each resample, ``[R, I]``; the same draws as `uae.metrics.intervals.bootstrap` makes."""
    draw, weight_RI = np.random.default_rng(seed), np.empty((resamples, images))
    for row_I in weight_RI:
        row_I[:] = np.bincount(draw.integers(images, size=images), minlength=images)
    return weight_RI


def interval(value: float, resampled_R: np.ndarray) -> Interval:
    """A value with the 95 % interval of its resamples ``[R]``; resamples without a case (NaN) are left out."""
    low, high = np.nanquantile(resampled_R, LEVEL)
    return Interval(float(value), float(low), float(high))


def ratio(total_I: np.ndarray, cases_I: np.ndarray, weight_RI: np.ndarray) -> np.ndarray:
    """The mean over the cases of each resample, ``[R]``; NaN for a resample without a case.

    Args:
        total_I: Sum of the values of each image's cases.
        cases_I: Number of each image's cases.
        weight_RI: How often each image counts in each resample, see `resample_weights`.
    """
    cases_R = weight_RI @ cases_I
    return np.divide(weight_RI @ total_I, cases_R, out=np.full(len(cases_R), np.nan), where=cases_R > 0)
