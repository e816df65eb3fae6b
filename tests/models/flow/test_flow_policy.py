"""The tiny Stable Diffusion 3 against its flow written out. Other pipelines: `test_flow_pipelines`."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.models.flow.flow_cases import (
    SEEDS,
    SIGMAS,
    STEPS,
    TEXTS,
    plain_gaussian,
    plain_trajectory,
    plain_transformer,
    plain_velocity,
    tiny_renderer,
    unpadded,
)
from uae.learner import FrozenCopy
from uae.models.conditioners.states import EmbeddingCondition
from uae.models.flow.policy import Exploration, FlowPolicy

CLOSE = {"atol": 1e-5, "rtol": 0}
LATENTS = {"atol": 2e-4, "rtol": 1e-5}  # of other arithmetic; these grow to 15
NOISE = 0.7


@pytest.fixture
def condition(decoder):
    return decoder[0].encode(TEXTS)


@pytest.fixture
def create(decoder):
    return lambda guidance=1.0, **settings: FlowPolicy(tiny_renderer(decoder, guidance), Exploration(**settings))


@pytest.fixture
def policy(create):
    return create()


def velocities(policy, condition, row, guidance):
    """The plain velocity of one row."""
    transformer, negative = plain_transformer(policy.learner.network.base), None
    if guidance > 1:
        negative = unpadded(policy.renderer.negative, 0)
    return lambda x, sigma: plain_velocity(transformer, x, sigma, unpadded(condition, row), negative, guidance)


# --------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("window", "start"), [(None, 0), (2, 0), (1, 3), (2, 1)])
def test_a_trajectory_is_the_sde_of_its_own_condition_and_noise(create, condition, guidance, window, start):
    policy = create(guidance, window=window, start=start)
    trajectory = policy.sample(condition, SEEDS)
    steps = range(start, start + (window or STEPS - 1))
    logp_NS = policy.logprobs(trajectory)
    assert trajectory.logp_RS.shape == trajectory.mask_RS.shape == logp_NS.shape == (4, len(steps))
    for row, seed in enumerate(SEEDS):
        xs, logp = plain_trajectory(velocities(policy, condition, row, guidance), seed, steps, NOISE)
        torch.testing.assert_close(trajectory.start_N[row], xs[start][0], **LATENTS)
        torch.testing.assert_close(trajectory.actions_RS[row], torch.cat([xs[i + 1] for i in steps]), **LATENTS)
        torch.testing.assert_close(trajectory.final_N[row], xs[-1][0], **LATENTS)
        torch.testing.assert_close(trajectory.logp_RS[row], logp, **CLOSE)
        torch.testing.assert_close(logp_NS[row], logp, **CLOSE)


@pytest.mark.parametrize("window", [{}, {"window": 2, "start": 1}, {"window": 1, "start": 3}])
def test_guidance_in_an_interval_is_that_of_the_same_steps_in_sampling_and_log_probs(create, condition, window):
    """Of the five steps the third and the fourth are guided, wherever the trained window begins."""
    policy = create(4.0, **window)
    policy.renderer.rendering = replace(policy.renderer.rendering, guidance_interval=(0.4, 0.8))
    trajectory = policy.sample(condition, SEEDS)
    logp_NS = policy.logprobs(trajectory)
    start = int(trajectory.first_N[0])
    steps = range(start, start + logp_NS.shape[1])
    for row, seed in enumerate(SEEDS):
        guided, alone = velocities(policy, condition, row, 4.0), velocities(policy, condition, row, 1.0)
        xs, logp = plain_trajectory(lambda x, t, g=guided, a=alone: (g if t in SIGMAS[2:4] else a)(x, t), seed, steps, NOISE)
        torch.testing.assert_close(trajectory.final_N[row], xs[-1][0], **LATENTS)
        torch.testing.assert_close(trajectory.logp_RS[row], logp, **CLOSE)
        torch.testing.assert_close(logp_NS[row], logp, **CLOSE)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_ratio_is_one(create, condition, guidance):
    policy = create(guidance)
    trajectory = policy.sample(condition, SEEDS)
    policy.learner.network.requires_grad_(True)
    logp_NS = policy.logprobs(trajectory)
    assert logp_NS.requires_grad
    torch.testing.assert_close(logp_NS.detach(), trajectory.logp_RS, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(policy.logprobs(trajectory), trajectory.logp_RS, **CLOSE)
    assert trajectory.mask_RS.eq(1).all()
    assert not trajectory.logp_RS.requires_grad
    part = trajectory.select([2, 0])
    assert len(part) == 2
    torch.testing.assert_close(policy.logprobs(part).detach(), trajectory.logp_RS[[2, 0]], **CLOSE)


def test_masked_steps_have_no_log_prob(policy, condition):
    trajectory = policy.sample(condition, SEEDS)
    masked = replace(trajectory, mask_RS=torch.tensor([[1.0, 0, 1, 0]] * 4))
    expected = trajectory.logp_RS * masked.mask_RS
    torch.testing.assert_close(policy.logprobs(masked).detach(), expected, **CLOSE)
    assert policy.logprobs(masked)[:, 1].eq(0).all()


def test_log_probs_of_other_weights(policy, condition):
    """After an update the action stays, the velocity moves."""
    trajectory = policy.sample(condition, SEEDS)
    for weight in policy.learner.network.parameters():
        weight.data.mul_(1.1)
    logp_NS = policy.logprobs(trajectory)
    assert (logp_NS - trajectory.logp_RS).abs().min() > 1e-4
    for row in range(4):
        velocity = velocities(policy, condition, row, 1.0)
        x = trajectory.start_N[row][None]
        for i in range(STEPS - 1):
            law = plain_gaussian(x, velocity(x, SIGMAS[i]), SIGMAS[i], SIGMAS[i + 1], NOISE)
            x = trajectory.actions_RS[row, i][None]
            torch.testing.assert_close(logp_NS[row, i].detach(), law.log_prob(x).mean().detach(), rtol=1e-4, atol=1e-5)


def test_random_windows_belong_to_rows(create, condition):
    policy = create(window=2, start="random")
    trajectory = policy.sample(condition, SEEDS)
    assert len(trajectory.first_N.unique()) > 1
    drawn = policy.sample(decoded := condition.index([0] * 40), range(40)).first_N
    assert sorted(drawn.unique().tolist()) == [0, 1, 2]  # never the last of the five steps
    assert len(decoded) == 40
    torch.testing.assert_close(policy.logprobs(trajectory).detach(), trajectory.logp_RS, **CLOSE)
    for row, seed in enumerate(SEEDS):
        first = int(trajectory.first_N[row])
        velocity = velocities(policy, condition, row, 1.0)
        xs, logp = plain_trajectory(velocity, seed, range(first, first + 2), NOISE)
        torch.testing.assert_close(trajectory.start_N[row], xs[first][0], **LATENTS)
        torch.testing.assert_close(trajectory.final_N[row], xs[-1][0], **LATENTS)
        torch.testing.assert_close(trajectory.logp_RS[row], logp, **CLOSE)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_rows_do_not_depend_on_their_batch(create, condition, guidance):
    policy = create(guidance, window=3, start="random")
    together = policy.sample(condition, SEEDS)
    policy.renderer.rendering = replace(policy.renderer.rendering, rows=3)
    parts = [([row], policy.sample(condition.index([row]), [SEEDS[row]])) for row in range(4)]
    turned = [2, 3, 0, 1]
    parts.append((turned, policy.sample(condition.index(turned), [SEEDS[row] for row in turned])))
    for rows, part in parts:
        assert part.first_N.equal(together.first_N[rows])
        for name in ("actions_RS", "logp_RS", "entropy_RS", "start_N"):
            torch.testing.assert_close(getattr(part, name), getattr(together, name)[rows], atol=3e-5, rtol=0)
        torch.testing.assert_close(part.final_N, together.final_N[rows], **LATENTS)
        torch.testing.assert_close(policy.logprobs(part).detach(), together.logp_RS[rows], **CLOSE)


def test_equal_seeds_draw_equally_and_others_do_not(policy, condition):
    same = policy.sample(condition.index([1, 1, 1]), [7, 7, 8])
    torch.testing.assert_close(same.actions_RS[0], same.actions_RS[1], **CLOSE)
    assert (same.actions_RS[0] - same.actions_RS[2]).abs().mean() > 0.1


def test_conditional_updates(create, condition):
    """Drawn with guidance, scored without: of the same actions, log-probs are those of guidance 1."""
    policy, guided = create(4.0, guidance_in_update="conditional"), create(4.0)
    trajectory, expected = policy.sample(condition, SEEDS), guided.sample(condition, SEEDS)
    torch.testing.assert_close(trajectory.actions_RS, expected.actions_RS, **CLOSE)
    torch.testing.assert_close(policy.logprobs(trajectory).detach(), trajectory.logp_RS, **CLOSE)
    torch.testing.assert_close(trajectory.logp_RS, create(1.0).logprobs(expected).detach(), **CLOSE)
    assert (trajectory.logp_RS - expected.logp_RS).abs().max() > 1e-2


# --------------------------------------------------------------------------------------------------------- the images


def test_pixels_are_what_sampling_drew(create, condition):
    policy = create(4.0)
    trajectory = policy.sample(condition, SEEDS)
    vae = policy.renderer.pipe.vae
    image = vae.decode(trajectory.final_N / vae.config.scaling_factor + vae.config.shift_factor).sample
    images = policy.pixels(trajectory)
    torch.testing.assert_close(images, (image / 2 + 0.5).clamp(0, 1), **CLOSE)
    assert images.dtype == torch.float32
    torch.testing.assert_close(policy.pixels(trajectory.select([3, 1])), images[[3, 1]], **CLOSE)


def test_without_noise_it_is_the_renderer(decoder, create, condition):
    expected = tiny_renderer(decoder, 4.0).render(condition, SEEDS)
    policy = create(4.0, noise_level=1e-7)
    torch.testing.assert_close(policy.pixels(policy.sample(condition, SEEDS)), expected, **CLOSE)
    noisy = create(4.0)
    assert (noisy.pixels(noisy.sample(condition, SEEDS)) - expected).abs().mean() > 1e-2
    assert torch.equal(noisy.render(condition, SEEDS), expected)


# -------------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_gradient_is_the_slope(create, condition, guidance):
    policy = create(guidance)
    policy.learner.network.double()
    trajectory = policy.sample(condition, SEEDS)
    assert trajectory.actions_RS.dtype == torch.float64
    weights = [weight.requires_grad_() for weight in policy.learner.network.parameters()]
    g = torch.Generator().manual_seed(0)
    directions = [torch.randn(weight.shape, generator=g, dtype=torch.float64) * weight.std() for weight in weights]
    factor_NS = torch.randn(4, STEPS - 1, generator=g, dtype=torch.float64)

    def total(step):
        for weight, direction in zip(weights, directions, strict=True):
            weight.data.add_(direction, alpha=step)
        value = (policy.logprobs(trajectory) * factor_NS).sum()
        for weight, direction in zip(weights, directions, strict=True):
            weight.data.sub_(direction, alpha=step)
        return value

    grads = torch.autograd.grad(total(0.0), weights, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None)
    with torch.no_grad():
        difference = (total(2e-4) - total(-2e-4)) / 4e-4
    torch.testing.assert_close(slope, difference, rtol=2e-3, atol=0)  # norms compute in float32
    assert difference.abs() > 1e-2


def test_the_gradient_reaches_the_condition_only_if_asked(policy, condition):
    embeds = condition.embeds_NLD.clone().requires_grad_()
    trajectory = policy.sample(EmbeddingCondition(embeds, condition.mask_NL, condition.pooled_NP), SEEDS)
    assert not policy.logprobs(trajectory).requires_grad  # nothing trains yet
    asked = replace(trajectory, condition=EmbeddingCondition(embeds, condition.mask_NL, condition.pooled_NP))
    policy.logprobs(asked).sum().backward()
    assert (embeds.grad[condition.mask_NL.bool()].abs().sum(-1) > 0).all()


def test_checkpointing_changes_no_gradient(policy, condition):
    trajectory = policy.sample(condition, SEEDS)
    policy.learner.network.requires_grad_(True)
    gradients = []
    for on in (False, True, False):
        policy.learner.network.gradient_checkpointing = on
        assert policy.learner.network.gradient_checkpointing is on
        policy.learner.network.zero_grad()
        policy.logprobs(trajectory).sum().backward()
        gradients.append(policy.learner.network.base.proj_out.weight.grad.clone())
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("settings", [{"window": 5}, {"window": 0}, {"window": 2, "start": 3}, {"start": -1}, {"start": 1}])
def test_windows_leave_out_the_last_step(create, settings):
    with pytest.raises(ValueError, match="exploration.window=.*1 to 4 steps in all.*change model.init_args.exploration.window"):
        create(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": "ode"}, "exploration.noise='ode'; allowed: flow, dance, cps; change model.init_args.exploration.noise"),
        ({"noise": "cps", "noise_level": 1.5}, "eta=1.5: .*at most 1; change model.init_args.exploration.noise_level"),
        ({"ratio": "mean"}, "exploration.ratio='mean'; allowed: density, centred, ratio_norm; change model.init_args"),
        ({"start": "end"}, "exploration.start='end'"),
        ({"guidance_in_update": "both"}, "guidance_in_update='both'"),
        ({"noise_level": 0.0}, "noise_level=0.0: without noise"),
    ],
)
def test_unknown_settings(create, settings, message):
    with pytest.raises(ValueError, match=message):
        create(**settings)


@pytest.mark.parametrize("placement", [{"offload": True}, {"device": "cpu"}])
def test_what_trains_is_where_the_trainer_is(decoder, placement):
    renderer = tiny_renderer(decoder)
    renderer.rendering = replace(renderer.rendering, placement=replace(renderer.rendering.placement, **placement))
    with pytest.raises(ValueError, match="the denoiser trains.*change model.init_args.system.init_args.rendering.placement"):
        FlowPolicy(renderer)


def test_one_seed_per_condition_and_a_reference_if_asked(policy, condition):
    with pytest.raises(ValueError, match="4 conditions but 3 seeds"):
        policy.sample(condition, SEEDS[:3])
    with pytest.raises(RuntimeError, match="were not kept"), policy.learner.reference():
        pass


def test_moving_moves_everything(policy):
    policy.learner.start = FrozenCopy(copy.deepcopy(policy.learner.network))
    assert policy.to("cpu") is policy
    assert policy.modules() == [policy.renderer.pipe.vae]
