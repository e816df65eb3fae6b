"""The Bradley-Terry model: strengths of systems from pairwise comparisons (Bradley & Terry 1952), fitted as in Hunter 2004."""

from __future__ import annotations

import numpy as np

ELO = 400 / np.log(10)
VIRTUAL = 0.25  # wins added to either side of every compared pair, half a tie: strengths stay finite under separation


def strengths(wins_RSS: np.ndarray, tolerance: float = 1e-10, rounds: int = 20000) -> np.ndarray:
    """Log-strengths ``[R, S]`` with sum zero: a beats b with probability ``sigmoid(theta_a - theta_b)``.

    Args:
        wins_RSS: Number of wins of system a over system b, ties as half a win for each, for R resamples of the same pairs.
        tolerance: The iteration ends when no log-strength changes by more than this.
        rounds: Largest number of iterations.

    Raises:
        ValueError: The comparisons do not connect all systems.
    """
    compared_SS = (wins_RSS + wins_RSS.swapaxes(1, 2)).sum(0) > 0
    if not connected(compared_SS):
        raise ValueError("some systems were never compared, not even through others, so their strengths are undefined")
    wins_RSS = wins_RSS + VIRTUAL * compared_SS
    won_RS, games_RSS = wins_RSS.sum(2), wins_RSS + wins_RSS.swapaxes(1, 2)
    theta_RS = np.zeros_like(won_RS)
    for _ in range(rounds):
        p_RS = np.exp(theta_RS)
        new_RS = np.log(won_RS / (games_RSS / (p_RS[:, :, None] + p_RS[:, None, :])).sum(2))
        new_RS -= new_RS.mean(1, keepdims=True)
        change, theta_RS = np.abs(new_RS - theta_RS).max(), new_RS
        if change < tolerance:
            break
    return theta_RS


def connected(compared_SS: np.ndarray) -> bool:
    """Whether the comparisons connect all systems, directly or through other systems."""
    reached = np.zeros(len(compared_SS), dtype=bool)
    reached[0] = True
    for _ in range(len(compared_SS)):
        reached |= compared_SS[reached].any(0)
    return bool(reached.all())
