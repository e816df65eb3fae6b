"""One denoising step of a flow-matching model as a Gaussian, so that it has a probability. Pure torch.

``x_t = (1 - t) x_0 + t noise`` with t from 1 (noise) to 0 (image), and a network that predicts the velocity
``v = E[noise - x_0 | x_t]``. The ordinary differential equation ``dx = v dt`` and, for any rate ``s(t)``, the stochastic one

    dx = (v + s^2 / (2 t) (x + (1 - t) v)) dt + s dW

have the same marginals (``-(x + (1 - t) v) / t`` is the score). A step from t down to t' is the Gaussian of its Euler scheme,
except in `FlowCPS`, which mixes the predicted image and noise instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NEAR_NOISE = 0.999  # a t above this counts as pure noise; schedules start at 1, 0.9999 or 0.9997


@dataclass(frozen=True)
class SDE:
    """The random step for any rate of noise; subclasses define the rate, or the whole step."""

    def rate(self, t: float, t_next: float) -> float:
        """s(t), the standard deviation of the noise per square root of time; above 0."""
        raise NotImplementedError

    def moments(self, x: Tensor, velocity: Tensor, t: float, t_next: float) -> tuple[Tensor, float]:
        """Mean and standard deviation of the next latents.

        Args:
            x: Latents at time ``t``, ``[N, ...]``. Half precision is converted to float32.
            velocity: The velocity that the network predicts at ``x`` and ``t``, in the shape of ``x``.
            t: Time before the step, above 0 and at most 1.
            t_next: Time after the step, from 0 to below ``t``.

        Returns:
            The mean, and one standard deviation for every latent dimension. The step to ``t_next = 0`` is deterministic:
            its standard deviation is 0, and it has no log-prob.
        """
        if t_next <= 0:
            return euler(x, velocity, t, t_next), 0.0
        s, step = self.rate(t, t_next), t_next - t
        x, velocity = _single(x), _single(velocity)
        mean = x + step * (velocity + s**2 / (2 * t) * (x + (1 - t) * velocity))
        return mean, s * math.sqrt(-step)


@dataclass(frozen=True)
class FlowSDE(SDE):
    """Flow-GRPO's rate (arXiv 2505.05470): ``s = a sqrt(t / (1 - t~))``, t~ = t.

    At pure noise, where that is infinite, t~ is the second time of the schedule, as in the authors' code (there for t = 1
    exactly; here for `NEAR_NOISE` too, or schedules that start a hair below 1 would explode).

    Args:
        noise_level: The factor a of the formula, above 0.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        """Refuse a policy without probabilities."""
        _above_zero("noise_level", self.noise_level)

    def rate(self, t: float, t_next: float) -> float:
        """Grows from 0 at the image to ``a / sqrt(step)`` at pure noise."""
        return self.noise_level * math.sqrt(t / (1 - (t_next if t > NEAR_NOISE else t)))


@dataclass(frozen=True)
class DanceSDE(SDE):
    """DanceGRPO's rate (arXiv 2505.07818): constant.

    Args:
        eta: The constant rate s, above 0.
    """

    eta: float = 0.3

    def __post_init__(self) -> None:
        """Refuse a policy without probabilities."""
        _above_zero("eta", self.eta)

    def rate(self, t: float, t_next: float) -> float:
        """Constant."""
        return self.eta


@dataclass(frozen=True)
class FlowCPS(SDE):
    """Coefficient-preserving sampling (Flow-CPS, arXiv 2509.05952): part of the predicted noise is drawn anew.

    With the predicted image ``x_0^ = x - t v`` and the predicted noise ``x_1^ = x + (1 - t) v``, the step is

        x' = (1 - t') x_0^ + t' cos(eta pi / 2) x_1^ + t' sin(eta pi / 2) z,   z ~ N(0, 1)

    so the squared coefficients of both noises add up to t'^2, and latents hold as much noise as the network expects at t'.
    Of Gaussian data, the mean of the marginals is preserved, but their spread is not: the noise of a step does not shrink with
    its length, so more steps do not correct it.

    The paper's log-prob is ``-(x' - mean)^2``, without the density's factor ``1 / (2 std^2)``, so it weighs steps by their
    variance. Here it is the density itself, as for the other kinds of noise, because ratio, entropy and KL divergence are those
    of one distribution only then. A clip range of the paper corresponds to one of the range divided by ``2 std^2`` here. The
    std falls with t', so late steps are clipped, and learn, more than early ones: with ten steps in Stable Diffusion 3's
    schedule, the one to t' = 0.009 hundreds of times as much as the first. Train early steps only
    (`uae.models.flow.policy.Exploration.window`), or choose the ratio "ratio_norm".

    Args:
        eta: Share of the noise that is new, as an angle: above 0, where the step is Euler's, and at most 1, where all noise is.
    """

    eta: float = 0.7

    def __post_init__(self) -> None:
        """Refuse a policy without probabilities, and angles beyond all of the noise."""
        _above_zero("eta", self.eta)
        if self.eta > 1:
            raise ValueError(
                f"eta={self.eta}: a step cannot draw more than all of its noise anew; allowed with noise cps: above 0 and at most "
                "1; change model.init_args.exploration.noise_level"
            )

    def moments(self, x: Tensor, velocity: Tensor, t: float, t_next: float) -> tuple[Tensor, float]:
        """Mean and standard deviation of the next latents, see `SDE.moments`."""
        if t_next <= 0:
            return euler(x, velocity, t, t_next), 0.0
        x, velocity = _single(x), _single(velocity)
        image, noise = x - t * velocity, x + (1 - t) * velocity
        angle = self.eta * math.pi / 2
        return (1 - t_next) * image + t_next * math.cos(angle) * noise, t_next * math.sin(angle)


def euler(x: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    """The deterministic step, which the random steps become when their noise goes to zero."""
    return _single(x) + (t_next - t) * _single(velocity)


def log_prob(x_next: Tensor, mean: Tensor, std: float | Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Log-density of the next latents, per row.

    Args:
        x_next: Latents after the step, ``[N, ...]``.
        mean: Mean of the step's Gaussian, in the shape of ``x_next``.
        std: Standard deviation of the step's Gaussian: one number, or one per row ``[N]``.
        reduction: "mean": nats per latent dimension, the unit of Flow-GRPO and DanceGRPO. An image has 1e4 to 1e6
            dimensions, and differences of the sum would leave any clip range; in this unit ranges of 1e-5 to 1e-4 are
            usual. "sum": nats, the density itself.

    Returns:
        One log-density per row, ``[N]``.
    """
    std = _per_row(std, mean)
    z = (_single(x_next) - mean) / std
    return _reduced(-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi), reduction)


def centred_log_prob(x_next: Tensor, mean: Tensor, old_mean: Tensor, std: float | Tensor, scaled: bool = False) -> Tensor:
    """A log-prob whose ratios are centred: `log_prob` with its logarithm made linear in the mean, at the mean of the sampler.

    With ``z = (x_next - old_mean) / std``, the logarithm of the ratio of two densities is
    ``z (mean - old_mean) / std - (mean - old_mean)^2 / (2 std^2)``. The second term pushes all ratios below 1, at every step by
    another amount, so clipping is lopsided. Without it the mean of the log-ratio is 0. At the sampler's weights, value and
    gradient are those of `log_prob`. Source: RatioNorm of GRPO-Guard, arXiv 2510.22319.

    Args:
        x_next: Latents after the step, ``[N, ...]``.
        mean: Mean of the step's Gaussian under the current weights, in the shape of ``x_next``.
        old_mean: The same under the weights that drew ``x_next``, without gradient.
        std: Standard deviation of the step's Gaussian: one number, or one per row ``[N]``.
        scaled: Whether the log-ratio is multiplied by ``std``, as in the paper, so that its spread depends on how far the mean
            moved, but not on how noisy the step is. The gradient of a step is multiplied by it, too.

    Returns:
        One number per row, ``[N]``, in nats per latent dimension (times ``std`` if scaled).
    """
    std_N1 = _per_row(std, mean)
    z = (_single(x_next) - old_mean) / std_N1
    moved = mean - old_mean if scaled else (mean - old_mean) / std_N1
    return log_prob(x_next, old_mean, std) + (z * moved).flatten(1).mean(1)


def divergence(mean: Tensor, reference_mean: Tensor, std: float | Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Exact KL divergence ``[N]`` between two Gaussians of equal ``std``; units as in `log_prob`.

    ``std`` is the standard deviation of the whole step, so it includes the step's length. Flow-GRPO's code divides by the
    squared *rate* only, so its KL penalty is this one times ``t - t_next``, and its KL coefficients are in that unit.
    """
    return _reduced(((mean - reference_mean) / _per_row(std, mean)).square() / 2, reduction)


def _per_row(std: float | Tensor, mean: Tensor) -> Tensor:
    """Reshape ``std`` so that it broadcasts over all but the first dimension of the mean."""
    return torch.as_tensor(std, dtype=mean.dtype, device=mean.device).reshape(-1, *[1] * (mean.ndim - 1))


def _reduced(each: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; allowed: mean, sum")
    flat_ND = each.flatten(1)
    return flat_ND.mean(1) if reduction == "mean" else flat_ND.sum(1)


def _single(x: Tensor) -> Tensor:
    """Convert to float32, but leave float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def _above_zero(key: str, value: float) -> None:
    if not value > 0:
        raise ValueError(
            f"{key}={value}: without noise a step has no log-prob; allowed: above 0; change model.init_args.exploration.noise_level"
        )
