"""Whether a reward and held-out encoders agree about the same images, and whether both improve together.

A reward is *cheated* when it rises because the policy found what only the reward likes. The functions here compare two
validations of the same N images. Rises are in *spreads*: standard deviations over the images of the first validation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.regression import spearman_corrcoef

CONFIDENCE = 3.0  # standard errors; a normal number is further off in one of 741 cases, to one side
RISE = 0.25  # spreads: a reward that rose less has not risen
SHARE = 0.25  # of the reward's rise: a held-out score that rose less is left behind
FALL = 0.1  # spreads: a held-out score that fell less has not fallen


def rank_correlation(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Spearman's rank correlation in [-1, 1] of N numbers with N others.

    Equal numbers share the mean of their ranks. Pairs with a number that is not finite are left out. It is 0 if all numbers of
    one side are equal, and for fewer than two pairs.
    """
    finite_N = np.isfinite(a_N) & np.isfinite(b_N)
    if finite_N.sum() < 2:
        return 0.0
    return float(spearman_corrcoef(*(torch.from_numpy(x_N[finite_N].astype(np.float64)) for x_N in (a_N, b_N))))


def shares_below(values_N: np.ndarray) -> np.ndarray:
    """For each of N finite numbers, the share in [0, 1] of the N that is smaller; of equal numbers, half counts as smaller."""
    ordered_N = np.sort(values_N)
    return (np.searchsorted(ordered_N, values_N, "left") + np.searchsorted(ordered_N, values_N, "right")) / (2 * len(values_N))


def spread(values_N: np.ndarray) -> float:
    """Standard deviation of N finite numbers; 1 where all are equal, so that what is divided by it keeps its unit."""
    deviation = float(np.std(values_N))
    return deviation if deviation > 1e-6 else 1.0


def errors_above_zero(change_N: np.ndarray) -> float:
    """Mean of N finite numbers in standard errors of that mean; infinite if all are the same number, 0 if that number is 0."""
    mean, count = float(np.mean(change_N)), len(change_N)
    if count < 2 or abs(mean) < 1e-9:
        return 0.0
    error = float(np.std(change_N, ddof=1)) / math.sqrt(count)
    return mean / error if error > 1e-9 else math.copysign(math.inf, mean)


@dataclass(frozen=True)
class Change:
    """How the reward and the held-out score of the same N images differ between two validations.

    Args:
        reward_N: Later minus earlier reward, in spreads, float64 ``[N]``.
        held_out_N: The same for the held-out score.
    """

    reward_N: np.ndarray
    held_out_N: np.ndarray

    @property
    def correlation(self) -> float:
        """Rank correlation of the improvements: positive where the images that gained reward also look better."""
        return rank_correlation(self.reward_N, self.held_out_N)

    @property
    def risen(self) -> bool:
        """Whether the mean reward rose by more than `RISE` spreads, with confidence."""
        return errors_above_zero(self.reward_N - RISE) > CONFIDENCE

    @property
    def left_behind(self) -> bool:
        """Whether the reward has risen, and the mean held-out score by less than `SHARE` of that, with confidence."""
        return self.risen and errors_above_zero(SHARE * self.reward_N - self.held_out_N) > CONFIDENCE

    @property
    def turned(self) -> bool:
        """Whether the mean reward rose, and the mean held-out score fell by more than `FALL` spreads, both with confidence."""
        return errors_above_zero(self.reward_N) > CONFIDENCE and errors_above_zero(-self.held_out_N - FALL) > CONFIDENCE
