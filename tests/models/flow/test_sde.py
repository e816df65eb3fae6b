"""Oracle: Gaussian data, for which the exact velocity is known, and torch's own distributions."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from uae.models.flow import sde
from uae.models.flow.sde import DanceSDE, FlowCPS, FlowSDE

MEAN, STD = 0.7, 0.5  # of the data
VARIANTS = {"flow": FlowSDE(0.7), "dance": DanceSDE(0.3)}
ALL = VARIANTS | {"cps": FlowCPS(0.7)}
TIMES = [(1.0, 0.9), (0.9, 0.75), (0.6, 0.3), (0.3, 0.01)]
g = torch.Generator().manual_seed(0)
X, V, Y = torch.randn(3, 2, 4, 5, generator=g, dtype=torch.float64)


def velocity(x, t):
    """E[noise - x_0 | x_t] for one-dimensional Gaussian data: a regression line."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def law(step, times):
    """Mean and standard deviation at the end: the steps are affine, so two points tell all of each."""
    mean, variance = 0.0, 1.0
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, t_next in zip(times, times[1:], strict=False):
        moved, std = step(points, velocity(points, t), t, t_next)
        offset, slope = moved[0].item(), (moved[1] - moved[0]).item()
        mean, variance = offset + slope * mean, slope**2 * variance + std**2
    return mean, math.sqrt(variance)


def ode(x, v, t, t_next):
    return sde.euler(x, v, t, t_next), 0.0


def evenly(steps):
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (ode, (0.431, 0.480, 0.499)),
        (FlowSDE(0.7).moments, (0.480, 0.497, 0.4995)),
        (DanceSDE(0.3).moments, (0.440, 0.485, 0.498)),
    ],
    ids=["ode", "flow", "dance"],
)
def test_the_steps_end_in_the_data(step, expected):
    """At 10, 40 and 400 steps; the error falls with the number of steps and is gone in the limit."""
    errors = []
    for steps, std in zip((10, 40, 400), expected, strict=True):
        found = law(step, evenly(steps))
        assert found[0] == pytest.approx(MEAN, abs=1e-9)  # the mean is exact at any number of steps
        assert found[1] == pytest.approx(std, abs=3e-3)
        errors.append(abs(found[1] - STD))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert law(step, evenly(20000))[1] == pytest.approx(STD, abs=3e-4)


@pytest.mark.parametrize("variant", [FlowSDE(0.2), FlowSDE(1.2), DanceSDE(1.0)])
def test_any_amount_of_noise_has_the_same_limit(variant):
    assert law(variant.moments, evenly(20000))[1] == pytest.approx(STD, abs=1e-3)


def test_an_uneven_schedule_ends_in_the_data_too():
    shifted = [3 * t / (1 + 2 * t) for t in evenly(4000)]
    for variant in VARIANTS.values():
        assert law(variant.moments, shifted)[1] == pytest.approx(STD, abs=1e-3)


def test_preserving_coefficients_preserves_the_mean_and_narrows_the_rest():
    """Its noise does not shrink with the step, so more steps do not correct the spread."""
    for steps, std in zip((10, 40, 400, 20000), (0.370, 0.409, 0.423, 0.425), strict=True):
        found = law(FlowCPS(0.7).moments, evenly(steps))
        assert found[0] == pytest.approx(MEAN, abs=1e-9)
        assert found[1] == pytest.approx(std, abs=2e-3)


@pytest.mark.parametrize("eta", [0.2, 0.7, 1.0])
@pytest.mark.parametrize(("t", "t_next"), TIMES)
def test_flow_cps_as_published(t, t_next, eta):
    mean, std = FlowCPS(eta).moments(X, V, t, t_next)
    fresh = t_next * math.sin(eta * math.pi / 2)
    kept = (t_next**2 - fresh**2) ** 0.5
    assert std == pytest.approx(fresh)
    torch.testing.assert_close(mean, (1 - t_next) * (X - t * V) + kept * (X + (1 - t) * V), atol=1e-7, rtol=0)
    image, noise = torch.eye(2, dtype=torch.float64)
    mean, std = FlowCPS(eta).moments((1 - t) * image + t * noise, noise - image, t, t_next)
    assert mean[0].item() == pytest.approx(1 - t_next)
    assert mean[1].item() ** 2 + std**2 == pytest.approx(t_next**2, abs=1e-15)


@pytest.mark.parametrize(("t", "t_next"), TIMES)
def test_flow_grpo_as_published(t, t_next):
    s = 0.7 * (t / (1 - (t_next if t == 1 else t))) ** 0.5
    step = t_next - t
    mean, std = FlowSDE(0.7).moments(X, V, t, t_next)
    expected = X * (1 + s**2 / (2 * t) * step) + V * (1 + s**2 * (1 - t) / (2 * t)) * step
    torch.testing.assert_close(mean, expected)
    assert std == pytest.approx(s * (t - t_next) ** 0.5)


@pytest.mark.parametrize(("t", "t_next"), TIMES)
def test_dance_grpo_as_published(t, t_next):
    image = X - t * V
    score = -(X - (1 - t) * image) / t**2
    mean, std = DanceSDE(0.3).moments(X, V, t, t_next)
    torch.testing.assert_close(mean, X + (t_next - t) * V - 0.5 * 0.3**2 * score * (t_next - t))
    assert std == pytest.approx(0.3 * (t - t_next) ** 0.5)


@pytest.mark.parametrize("t", [1.0, 0.99999, 0.9997])
def test_pure_noise_is_no_singularity(t):
    mean, std = FlowSDE(0.7).moments(X, V, t, 0.96)
    at_one, std_at_one = FlowSDE(0.7).moments(X, V, 1.0, 0.96)
    assert std == pytest.approx(0.7, rel=0.01)  # a sqrt(t / (1 - t')) sqrt(t - t')
    assert std == pytest.approx(std_at_one, rel=0.01)
    torch.testing.assert_close(mean, at_one, atol=0.02, rtol=0)


@pytest.mark.parametrize("variant", ALL.values(), ids=ALL)
def test_the_last_step_is_deterministic(variant):
    mean, std = variant.moments(X, V, 0.3, 0.0)
    assert std == 0
    torch.testing.assert_close(mean, X - 0.3 * V)


@pytest.mark.parametrize(("t", "t_next"), TIMES)
def test_without_noise_the_step_is_eulers(t, t_next):
    for variant in (FlowSDE(1e-9), DanceSDE(1e-9), FlowCPS(1e-9)):
        mean, std = variant.moments(X, V, t, t_next)
        torch.testing.assert_close(mean, X + (t_next - t) * V)
        assert 0 < std < 1e-8


@pytest.mark.parametrize("variant", ALL.values(), ids=ALL)
def test_log_prob_is_the_normal_density(variant):
    mean, std = variant.moments(X, V, 0.6, 0.5)
    expected = Normal(mean, std).log_prob(Y)
    torch.testing.assert_close(sde.log_prob(Y, mean, std), expected.mean((1, 2)))
    torch.testing.assert_close(sde.log_prob(Y, mean, std, "sum"), expected.sum((1, 2)))


def test_divergence_is_that_of_two_normals():
    (mean, std), (other, _) = (FlowSDE().moments(x, V, 0.6, 0.5) for x in (X, Y))
    expected = kl_divergence(Normal(mean, std), Normal(other, std))
    torch.testing.assert_close(sde.divergence(mean, other, std), expected.mean((1, 2)))
    torch.testing.assert_close(sde.divergence(mean, other, std, "sum"), expected.sum((1, 2)))
    rate = FlowSDE().rate(0.6, 0.5)  # what Flow-GRPO's code divides by
    by_rate = ((mean - other) ** 2 / (2 * rate**2)).mean((1, 2))
    torch.testing.assert_close(by_rate, sde.divergence(mean, other, std) * 0.1)


def test_half_precision_is_computed_with_in_single():
    x, v, y = (tensor.bfloat16() for tensor in (X, V, Y))
    mean, std = FlowSDE().moments(x, v, 0.6, 0.5)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, FlowSDE().moments(x.float(), v.float(), 0.6, 0.5)[0])
    assert sde.euler(x, v, 0.6, 0.5).dtype == sde.log_prob(y, mean, std).dtype == torch.float32
    assert FlowSDE().moments(X, V, 0.6, 0.5)[0].dtype == torch.float64


@pytest.mark.parametrize("value", [0, -0.1, float("nan")])
def test_a_policy_needs_noise(value):
    with pytest.raises(ValueError, match="noise_level=.*change model.init_args.exploration.noise_level"):
        FlowSDE(value)
    for variant in (DanceSDE, FlowCPS):
        with pytest.raises(ValueError, match="eta=.*change model.init_args.exploration.noise_level"):
            variant(value)


def test_all_noise_is_the_most_that_can_be_new():
    with pytest.raises(ValueError, match="eta=1.01: .*above 0 and at most 1; change model.init_args.exploration.noise_level"):
        FlowCPS(1.01)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="reduction='median'; allowed: mean, sum"):
        sde.log_prob(X, Y, 1.0, "median")
