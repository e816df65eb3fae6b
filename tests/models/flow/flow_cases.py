"""The tiny Stable Diffusion 3, and its flow written out: one row at a time, no padding, diffusers' own attention."""

import copy

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch.distributions import Normal

from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.rendering import Rendering
from uae.weights.placement import Placement

TEXTS = ["a red square", "a tiny blue ring at top left and a white cross on a navy background", "a pink cross", ""]
SEEDS = [3, 4, 5, 2**62 + 1]
STEPS = 5
SIGMAS = [1.0, 0.75025, 0.5005, 0.25075, 0.001, 0.0]


def tiny_renderer(decoder, guidance=1.0, steps=STEPS):
    """A renderer of its own around copies of the networks."""
    conditioner, renderer = decoder
    negative = conditioner.encode(["a blue ring"]) if guidance > 1 else None
    rendering = Rendering(24, 24, steps=steps, guidance=guidance, placement=Placement("float32"))
    return DiffusersRenderer(copy.deepcopy(renderer.pipe), rendering, negative)


def unpadded(condition, row):
    """One row without its padding, and without anything that says so."""
    length = int(condition.mask_NL[row].sum())
    return condition.embeds_NLD[row : row + 1, :length], condition.pooled_NP[row : row + 1]


def plain_transformer(transformer):
    """A copy without our attention."""
    own = copy.deepcopy(transformer)
    own.set_attn_processor(JointAttnProcessor2_0())
    return own


def plain_velocity(transformer, x, sigma, positive, negative=None, guidance=1.0):
    """Two calls and their mixture."""

    def predict(one):
        time = torch.tensor([1000 * sigma])
        return transformer(x, encoder_hidden_states=one[0], pooled_projections=one[1], timestep=time)[0]

    if guidance == 1:
        return predict(positive)
    without = predict(negative)
    return without + guidance * (predict(positive) - without)


def plain_rate(sigma, then, noise_level):
    """Flow-GRPO's."""
    return noise_level * (sigma / (1 - (then if sigma == 1 else sigma))) ** 0.5


def plain_gaussian(x, velocity, sigma, then, noise_level):
    """Of the next latents, by the published formula."""
    s, step = plain_rate(sigma, then, noise_level), then - sigma
    mean = x * (1 + s**2 / (2 * sigma) * step) + velocity * (1 + s**2 * (1 - sigma) / (2 * sigma)) * step
    return Normal(mean, s * (-step) ** 0.5)


@torch.no_grad()
def plain_trajectory(velocity, seed, random_steps, noise_level):
    """Latents from noise to image, and the log-prob of each random step, in nats per dimension."""
    generator = torch.Generator().manual_seed(seed)
    xs, logps = [torch.randn(1, 16, 3, 3, generator=generator)], []
    for i, (sigma, then) in enumerate(zip(SIGMAS, SIGMAS[1:], strict=False)):
        x, v = xs[-1], velocity(xs[-1], sigma)
        following = x + (then - sigma) * v
        if i in random_steps:
            law = plain_gaussian(x, v, sigma, then, noise_level)
            following = law.mean + law.stddev * torch.randn(1, 16, 3, 3, generator=generator)
            logps.append(law.log_prob(following).mean())
        xs.append(following)
    return xs, torch.stack(logps)
