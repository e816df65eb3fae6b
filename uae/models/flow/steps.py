"""Step functions of a diffusion policy for `uae.models.pipelines.steps.stepping`: one draws a sample, one replays it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uae.models.flow.sde import SDE, euler, log_prob


class DrawingSteps:
    """Draws a sample: steps inside a row's window are random, the others are Euler's deterministic ones.

    Args:
        variant: Formula of the random step.
        generators: One random generator per row, which has already drawn the row's initial noise.
        first: Number of the first random step of each row.
        window: S, the number of consecutive random steps.
        keep_means: Whether the means of the random steps are kept, which takes as much memory as the latents in float32.
    """

    def __init__(
        self, variant: SDE, generators: list[torch.Generator], first: list[int], window: int, keep_means: bool = False
    ) -> None:
        self.variant, self.generators, self.first, self.window = variant, generators, first, window
        self.keep_means = keep_means
        self.kept: list[list[Tensor]] = [[] for _ in first]  # per random step, its mean
        self.rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in first]  # per random step: latents after it, its log-prob
        self.stds: list[list[float]] = [[] for _ in first]
        self.before: list[Tensor] = [torch.empty(0)] * len(first)
        self.final = torch.empty(0)  # latents [N, ...] after the last step so far

    def __call__(self, number: int, t: float, t_next: float, x: Tensor, velocity: Tensor) -> Tensor:
        """Latents at time ``t_next``, rounded to the dtype of ``x``, because a replay will see the rounded ones."""
        self.final = self._next(number, t, t_next, x, velocity)
        return self.final

    def _next(self, number: int, t: float, t_next: float, x: Tensor, velocity: Tensor) -> Tensor:
        after = euler(x, velocity, t, t_next).to(x.dtype)
        trained = [row for row, first in enumerate(self.first) if first <= number < first + self.window]
        if not trained:
            return after
        mean, std = self.variant.moments(x[trained], velocity[trained], t, t_next)
        noise = [torch.randn(x.shape[1:], generator=self.generators[row]) for row in trained]
        after[trained] = (mean + std * torch.stack(noise).to(mean)).to(x.dtype)
        logp = log_prob(after[trained], mean, std)
        if self.keep_means:
            for row, own in zip(trained, mean, strict=True):
                self.kept[row].append(own)
        for row, own in zip(trained, logp, strict=True):
            if number == self.first[row]:
                self.before[row] = x[row]
            self.rows[row].append((after[row], own))
            self.stds[row].append(std)
        return after

    def actions(self) -> Tensor:
        """Latents ``[N, S, ...]`` after each random step."""
        return torch.stack([torch.stack([after for after, _ in row]) for row in self.rows])

    def means(self) -> Tensor:
        """Means ``[N, S, ...]`` of the normal distributions of the random steps, if they were kept."""
        return torch.stack([torch.stack(row) for row in self.kept])

    def logprobs(self) -> Tensor:
        """Log-probs ``[N, S]`` of the random steps, in nats per latent dimension."""
        return torch.stack([torch.stack([own for _, own in row]) for row in self.rows])

    def entropies(self) -> Tensor:
        """Entropies ``[N, S]`` of the normal distributions of the random steps, in nats per latent dimension."""
        return 0.5 * math.log(2 * math.pi * math.e) + torch.tensor(self.stds).log()

    def starts(self) -> Tensor:
        """Latents ``[N, ...]`` before the first random step."""
        return torch.stack(self.before)


class ReplayingSteps:
    """Replays recorded steps: each step ends in the recorded latents, and the mean under the current weights is kept.

    Args:
        variant: Formula of the random step.
        actions_NS: Recorded latents after each random step, ``[N, S, ...]``.
        first: Number of the first random step, the same for all rows.
    """

    def __init__(self, variant: SDE, actions_NS: Tensor, first: int) -> None:
        self.variant, self.actions_NS, self.first = variant, actions_NS, first
        self.means: list[Tensor] = []
        self.stds: list[float] = []

    def __call__(self, number: int, t: float, t_next: float, x: Tensor, velocity: Tensor) -> Tensor:
        """Return the recorded latents, and keep mean and standard deviation of the step under the current velocity."""
        mean, std = self.variant.moments(x, velocity, t, t_next)
        self.means.append(mean)
        self.stds.append(std)
        return self.actions_NS[:, number - self.first].to(x).contiguous()  # in the memory layout of sampling, which affects rounding
