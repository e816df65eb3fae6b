"""OmniGen2's transformer against a plain computation row by row, written from its description in float64, and as a policy."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm, linear, silu

from uae.coldstart.velocity import velocity_of
from uae.models.captioners.loading import Reading
from uae.models.finetune import Full, LoRA
from uae.models.flow.policy import Exploration, FlowPolicy
from uae.models.flow.sde import FlowSDE, log_prob
from uae.models.renderers.diffusers import Rendering
from uae.systems.omnigen2 import OmniGen2
from uae.weights.placement import Placement
from uae.weights.state import read_state

CAPTIONS = ["a red square", 'A tiny blue ring at the top left, and a "white" cross; navy background.']
HEADS, GROUPS, SIZE, AXIS = 4, 2, 12, 4
UNUSED = ("ref_image_patch_embedder", "ref_image_refiner", "image_index_embedding")


def built(folder, **changes):
    drawing = {"height": 48, "width": 32, "steps": 4, "guidance": 4.0, "rows": 2, "placement": Placement("float32"), **changes}
    return OmniGen2(str(folder), negative_prompt="blurry", reading=Reading(dtype="float32"), rendering=Rendering(**drawing)).build()


@pytest.fixture(scope="module")
def umm(folder):
    return built(folder)


@pytest.fixture(scope="module")
def conditions(umm):
    with torch.no_grad():
        return umm.conditioner.encode(CAPTIONS), umm.renderer.negative()


class Plain:
    """The network for one row, without padding, head by head."""

    def __init__(self, folder):
        self.w = {name: value.double() for name, value in read_state(folder / "transformer").items()}

    def of(self, name, x):
        return linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.w[f"{name}.weight"]

    def turned(self, x, places):
        """One head of all tokens: channels in pairs of neighbours, a third of them by each of a place's three numbers."""
        out = x.clone()
        for n in range(SIZE // 2):
            axis, pair = divmod(n, AXIS // 2)
            angle = torch.tensor([place[axis] / 10000 ** (2 * pair / AXIS) for place in places], dtype=torch.float64)
            out[:, 2 * n] = x[:, 2 * n] * angle.cos() - x[:, 2 * n + 1] * angle.sin()
            out[:, 2 * n + 1] = x[:, 2 * n + 1] * angle.cos() + x[:, 2 * n] * angle.sin()
        return out

    def layer(self, name, x, places, time=None):
        first, scales, gates = f"{name}.norm1", [0.0, 0.0], [1.0, 1.0]
        if time is not None:
            parts = self.of(f"{name}.norm1.linear", silu(time)).split(HEADS * SIZE)
            first, scales, gates = f"{name}.norm1.norm", [parts[0], parts[2]], [parts[1].tanh(), parts[3].tanh()]
        normed = self.norm(first, x) * (1 + scales[0])
        q, k, v = (self.of(f"{name}.attn.to_{part}", normed).split(SIZE, dim=1) for part in "qkv")
        q, k = (
            [self.turned(self.norm(f"{name}.attn.norm_{part}", head), places) for head in heads]
            for part, heads in (("q", q), ("k", k))
        )
        groups = [head // (HEADS // GROUPS) for head in range(HEADS)]
        heads = [(q[n] @ k[group].T / SIZE**0.5).softmax(1) @ v[group] for n, group in enumerate(groups)]
        x = x + gates[0] * self.norm(f"{name}.norm2", self.of(f"{name}.attn.to_out.0", torch.cat(heads, 1)))
        normed, inside = self.norm(f"{name}.ffn_norm1", x) * (1 + scales[1]), f"{name}.feed_forward.linear"
        inner = self.of(f"{inside}_2", silu(self.of(f"{inside}_1", normed)) * self.of(f"{inside}_3", normed))
        return x + gates[1] * self.norm(f"{name}.ffn_norm2", inner)

    def velocity(self, words, latents, t):
        """Of one row: states of real tokens ``[L, D]``, latents ``[C, H, W]`` and a time from 0 (noise) to 1 (image)."""
        waves = [1000 * t / 10000 ** (n / 128) for n in range(128)]
        time = torch.tensor([math.cos(a) for a in waves] + [math.sin(a) for a in waves], dtype=torch.float64)
        embed = "time_caption_embed"
        time = self.of(f"{embed}.timestep_embedder.linear_2", silu(self.of(f"{embed}.timestep_embedder.linear_1", time)))
        text = self.of(f"{embed}.caption_embedder.1", self.norm(f"{embed}.caption_embedder.0", words.double()))
        at = [(n, n, n) for n in range(len(text))]
        text = self.layer("context_refiner.0", text, at)
        cells = [(row, column) for row in range(latents.shape[1] // 2) for column in range(latents.shape[2] // 2)]
        pixels = [latents[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].permute(1, 2, 0).flatten().double() for r, c in cells]
        places = [(len(text), row, column) for row, column in cells]
        x = torch.cat([text, self.layer("noise_refiner.0", self.of("x_embedder", torch.stack(pixels)), places, time)])
        for number in range(2):
            x = self.layer(f"layers.{number}", x, at + places, time)
        out = torch.zeros_like(latents, dtype=torch.float64)
        for state, (r, c) in zip(x[len(text) :], cells, strict=True):
            normed = layer_norm(state, state.shape, eps=1e-6) * (1 + self.of("norm_out.linear_1", silu(time)))
            out[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = self.of("norm_out.linear_2", normed).view(2, 2, -1).permute(2, 0, 1)
        return out


@pytest.fixture(scope="module")
def plain(folder):
    return Plain(folder)


def rows_of(condition):
    return [states[mask.bool()] for states, mask in zip(condition.embeds_NLD, condition.mask_NL, strict=True)]


@torch.no_grad()
def test_velocities_are_those_of_the_plain_one(umm, conditions, plain):
    """Captions of two lengths in one call, at two times."""
    x, t = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.15, 0.8])
    condition, network = conditions[0], umm.renderer.pipe.transformer
    assert condition.mask_NL.sum(1).unique().numel() == 2
    found = network(x, t, condition.embeds_NLD, condition.mask_NL).sample
    expected = [plain.velocity(*row) for row in zip(rows_of(condition), x, t.tolist(), strict=True)]
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-4, rtol=0)
    assert found.abs().max() > 1
    short = rows_of(condition)[:1][0][None]
    torch.testing.assert_close(network(x[:1], t[:1], short).sample, found[:1], atol=1e-5, rtol=0)
    asked = velocity_of(umm.renderer, x, 1 - t, condition)  # as the cold start does: to noise, at times from image to noise
    torch.testing.assert_close(asked, -found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("interval", [None, (0.25, 0.75)])
@torch.no_grad()
def test_drawing_is_euler_at_times_shifted_by_the_size(folder, conditions, plain, interval):
    """Noise from the seed, t / (m - m t + t) with m the root of the latents' area over 40, guidance, and the autoencoder."""
    umm = built(folder, guidance_interval=interval)
    (words, _), (unasked,) = map(rows_of, conditions)
    x = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(7)).double()
    m = math.sqrt(6 * 4) / 40
    times = [t / (m - m * t + t) for t in (0, 0.25, 0.5, 0.75)] + [1.0]
    for step, (t, after) in enumerate(zip(times, times[1:], strict=False)):
        c, u = (plain.velocity(states, x, t) for states in (words, unasked))
        x = x + (after - t) * (u + 4 * (c - u) if interval is None or step in (1, 2) else c)
    vae = umm.renderer.pipe.vae
    image = vae.decode(x[None].float() / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5
    found = umm.renderer.render(conditions[0], [7, 8])
    torch.testing.assert_close(found[:1], image.clamp(0, 1), atol=1e-4, rtol=0)
    assert found.std() > 0.05
    for row in range(2):
        alone = umm.renderer.render(conditions[0].index([row]), [7 + row])
        torch.testing.assert_close(alone[0], found[row], atol=2e-5, rtol=0)


def test_times_of_a_large_image(umm):
    """At 1024 pixels the shift is 3.2; a step in the middle of the schedule is at 1 / (1 + 3.2)."""
    scheduler = umm.renderer.pipe.scheduler
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=math.sqrt(128 * 128) / 40)
    assert scheduler.sigmas.tolist() == pytest.approx([0.0, 1 / 4.2, 1.0])


def test_ratios_are_one_and_those_of_the_densities_of_the_plain_one(umm, conditions, plain):
    policy = FlowPolicy(umm.renderer, Exploration())
    condition = conditions[0]
    drawn = policy.sample(condition, [1, 2])
    logp = policy.logprobs(drawn).detach()
    assert logp.shape == (2, 3)
    torch.testing.assert_close(logp, drawn.logp_RS, atol=1e-5, rtol=0)
    one = policy.sample(condition.index([1]), [2])
    torch.testing.assert_close(one.actions_RS, drawn.actions_RS[1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(policy.logprobs(one).detach(), logp[1:], atol=1e-4, rtol=0)
    m, x = math.sqrt(6 * 4) / 40, drawn.actions_RS[0, 0].double()
    t, after = (n / 4 / (m - m * n / 4 + n / 4) for n in (1, 2))
    c, u = (plain.velocity(states, x, t) for states in (rows_of(condition)[0], rows_of(conditions[1])[0]))
    mean, std = FlowSDE(0.7).moments(x[None], -(u + 4 * (c - u))[None], 1 - t, 1 - after)
    torch.testing.assert_close(log_prob(drawn.actions_RS[:1, 1], mean.float(), std), logp[:1, 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("finetune", [LoRA(rank=4), Full()], ids=["lora", "full"])
def test_gradients_reach_what_trains(folder, finetune):
    """All of it; the weights for input images are there and stay; computing layers again changes no gradient."""
    umm = built(folder, steps=2)
    policy = FlowPolicy(umm.renderer, Exploration())
    finetune.attach(policy.learner, keep_reference=False)
    network = policy.learner.network
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        condition = umm.conditioner.encode(CAPTIONS)
    drawn, gradients = policy.sample(condition, [1, 2]), []
    for again in (False, True):
        network.zero_grad()
        network.gradient_checkpointing = again
        policy.logprobs(drawn).sum().backward()
        gradients.append({name: weight.grad for name, weight in network.named_parameters() if weight.requires_grad})
    assert not [name for name, gradient in gradients[0].items() if gradient is None]
    trained, held = " ".join(gradients[0]), set(network.base.state_dict())
    assert not any(name in trained for name in UNUSED)
    assert all(any(key.startswith(name) for key in held) for name in UNUSED)
    if isinstance(finetune, LoRA):
        layers = {name.split(".lora_")[0].split(".", 4)[-1].split("attn.")[1] for name in gradients[0]}
        assert layers == {"to_q", "to_k", "to_v", "to_out.0"}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_it_learns_from_rewards(folder):
    """Adapters on the transformer, from one rollout after the other: the first channel of the latents rises."""
    umm = built(folder, guidance=1.0, height=32, steps=3, rows=16)
    policy = FlowPolicy(umm.renderer, Exploration(noise_level=1.0))
    LoRA(rank=8).attach(policy.learner, keep_reference=False)
    optimizer = torch.optim.AdamW([p for p in policy.learner.network.parameters() if p.requires_grad], lr=1e-2)
    with torch.no_grad():
        condition = umm.conditioner.encode(CAPTIONS[:1] * 16)
    means = []
    for step in range(10):
        drawn = policy.sample(condition, range(16 * step, 16 * step + 16))
        first = drawn.final_N[:, 0].mean((1, 2))
        advantage = (first - first.mean()) / (first.std() + 1e-6)
        optimizer.zero_grad()
        (-(policy.logprobs(drawn).sum(1) * advantage).mean()).backward()
        optimizer.step()
        means.append(first.mean().item())
    assert min(means[-3:]) > max(means[:3])
