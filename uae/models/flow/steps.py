"""Step functions of a diffusion policy, for `uae.models.pipelines.steps.stepping`: one draws, one replays."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uae.models.flow.sde import SDE, euler, log_prob


class Drawn:
    """Steps that draw: random ones inside every row's window, Euler's outside.

    Args:
        variant: The random step.
        generators: One per row, in the state that the initial noise left them in.
        first: Number of the first random step, per row.
        window: S, random steps in a row.
    """

    def __init__(self, variant: SDE, generators: list[torch.Generator], first: list[int], window: int) -> None:
        self.variant, self.generators, self.first, self.window = variant, generators, first, window
        self.rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in first]  # latents after, log-prob
        self.stds: list[list[float]] = [[] for _ in first]
        self.before: list[Tensor] = [torch.empty(0)] * len(first)

    def __call__(self, number: int, t: float, t_next: float, x: Tensor, velocity: Tensor) -> Tensor:
        """Latents of the next time, in the dtype of these: what a replay will see."""
        after = euler(x, velocity, t, t_next).to(x.dtype)
        trained = [row for row, first in enumerate(self.first) if first <= number < first + self.window]
        if not trained:
            return after
        mean, std = self.variant.moments(x[trained], velocity[trained], t, t_next)
        noise = [torch.randn(x.shape[1:], generator=self.generators[row]) for row in trained]
        after[trained] = (mean + std * torch.stack(noise).to(mean)).to(x.dtype)
        logp = log_prob(after[trained], mean, std)
        for row, own in zip(trained, logp, strict=True):
            if number == self.first[row]:
                self.before[row] = x[row]
            self.rows[row].append((after[row], own))
            self.stds[row].append(std)
        return after

    def actions(self) -> Tensor:
        """Latents ``[N, S, ...]`` after each random step."""
        return torch.stack([torch.stack([after for after, _ in row]) for row in self.rows])

    def logprobs(self) -> Tensor:
        """``[N, S]``, in nats per latent dimension."""
        return torch.stack([torch.stack([own for _, own in row]) for row in self.rows])

    def entropies(self) -> Tensor:
        """``[N, S]``, in nats per latent dimension: those of normal distributions."""
        return 0.5 * math.log(2 * math.pi * math.e) + torch.tensor(self.stds).log()

    def starts(self) -> Tensor:
        """Latents ``[N, ...]`` before the first random step."""
        return torch.stack(self.before)


class Replayed:
    """Steps that were taken before: each goes where it went, whatever the velocity is now.

    Args:
        variant: The random step.
        actions_NS: ``[N, S, ...]``, latents after each step.
        first: Number of the first one.
    """

    def __init__(self, variant: SDE, actions_NS: Tensor, first: int) -> None:
        self.variant, self.actions_NS, self.first = variant, actions_NS, first
        self.means: list[Tensor] = []
        self.stds: list[float] = []

    def __call__(self, number: int, t: float, t_next: float, x: Tensor, velocity: Tensor) -> Tensor:
        """The recorded latents; remembers the mean they would be drawn around now."""
        mean, std = self.variant.moments(x, velocity, t, t_next)
        self.means.append(mean)
        self.stds.append(std)
        return self.actions_NS[:, number - self.first].to(x).contiguous()  # laid out as drawn: rounding depends on it
