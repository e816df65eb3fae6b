"""The win rate at equal caption length, by logistic regression on the difference of lengths."""

from __future__ import annotations

import numpy as np

PRIOR = 1.0  # precision of the normal prior of the slope; the prior of the intercept is one virtual tie at equal lengths
ROUNDS, LONGEST_STEP = 60, 2.0


def at_equal_length(total_I: np.ndarray, cases_I: np.ndarray, difference_I: np.ndarray, weight_RI: np.ndarray) -> np.ndarray:
    """Intercepts and slopes ``[R, 2]`` of ``P(a wins) = sigmoid(intercept + slope * difference / spread)``.

    The probability at equal lengths is ``sigmoid(intercept)``. Finite whatever the data: see `PRIOR`.

    Args:
        total_I: Number of wins of a on each image, ties as a half.
        cases_I: Number of comparisons on each image.
        difference_I: Number of words of a's caption minus number of words of b's.
        weight_RI: How often each image counts in each resample, see `resample_weights`.
    """
    spread = np.sqrt(np.average(difference_I**2.0, weights=cases_I)) or 1.0  # about zero: zero stays equal length
    x_I, beta_R2 = difference_I / spread, np.zeros((len(weight_RI), 2))
    cases_RI, total_RI = weight_RI * cases_I, weight_RI * total_I
    for _ in range(ROUNDS):
        p_RI, p_R = sigmoid(beta_R2[:, :1] + beta_R2[:, 1:] * x_I), sigmoid(beta_R2[:, 0])
        residual_RI, curve_RI = total_RI - cases_RI * p_RI, cases_RI * p_RI * (1 - p_RI)
        slope_R2 = np.stack([residual_RI.sum(1) + 0.5 - p_R, residual_RI @ x_I - PRIOR * beta_R2[:, 1]], 1)
        h00_R, h01_R, h11_R = curve_RI.sum(1) + p_R * (1 - p_R), curve_RI @ x_I, curve_RI @ x_I**2 + PRIOR
        step_R2 = np.stack([h11_R * slope_R2[:, 0] - h01_R * slope_R2[:, 1], h00_R * slope_R2[:, 1] - h01_R * slope_R2[:, 0]], 1)
        step_R2 = step_R2 / (h00_R * h11_R - h01_R**2)[:, None]
        beta_R2 = beta_R2 + np.clip(step_R2, -LONGEST_STEP, LONGEST_STEP)
        if np.abs(step_R2).max() < 1e-10:
            break
    return beta_R2


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))
