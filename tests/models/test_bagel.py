"""BAGEL's network against plain loops over tokens, written from its description in float64, and as a policy."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear, log_softmax, silu

from uae.models.bagel.guidance import Guidance
from uae.models.bagel.pixels import Scaling, patches, scaled, unpatched
from uae.models.bagel.renderer import BagelRendering
from uae.models.captioners.loading import Reading
from uae.models.finetune import Full, LoRA
from uae.models.flow.policy import Exploration, FlowPolicy
from uae.policies import freeze_unreached
from uae.rehearsal.catalog import write
from uae.systems.bagel import Bagel
from uae.types import Sampling
from uae.weights.placement import Placement

NAME = "ByteDance-Seed/BAGEL-7B-MoT"
DRAWING = BagelRendering(48, 32, steps=4, rows=2, placement=Placement("float32"))
CAPTIONS = ["a red square", 'A tiny blue ring at the top left, and a "white" cross; navy background.']
HEADS, GROUPS, SIZE = 4, 2, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder, [NAME])
    return folder / NAME


def built(folder, **changes):
    """The system, with images read as a few patches instead of 729."""
    reading = Reading(dtype="float32", instruction="What is it?")
    umm = Bagel(str(folder), reading=reading, rendering=replace(DRAWING, **changes)).build()
    umm.captioner.processor.scaling = Scaling(longest=56, shortest=28)
    return umm


@pytest.fixture(scope="module")
def umm(folder):
    return built(folder)


def pictures():
    return [torch.rand(3, 20, side, generator=torch.Generator().manual_seed(side)) for side in (20, 33)]


# -------------------------------------------------------------------------------------------------- the plain loop


class Loop:
    """The network, one token after the other."""

    def __init__(self, umm):
        self.w = {name: value.double() for name, value in umm.captioner.learner.network.base.state_dict().items()}

    def of(self, name, x):
        return linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name, x):
        return x / (x.pow(2).mean() + 1e-6).sqrt() * self.w[f"{name}.weight"]

    def turned(self, x, position):
        half, out = SIZE // 2, x.clone()
        for n in range(half):
            angle = position / 1e6 ** (2 * n / SIZE)
            out[n] = x[n] * math.cos(angle) - x[n + half] * math.sin(angle)
            out[n + half] = x[n + half] * math.cos(angle) + x[n] * math.sin(angle)
        return out

    def states(self, tokens):
        """Final states of tokens, each (embedding, set of weights, position, number of its image block or None)."""
        x = [embedding for embedding, *_ in tokens]
        for number in range(2):
            layer = f"language_model.model.layers.{number}"
            q, k, v = [], [], []
            for state, (_, end, position, _) in zip(x, tokens, strict=True):
                normed = self.norm(f"{layer}.input_layernorm{end}", state)
                for name, to in (("q", q), ("k", k)):
                    heads = self.of(f"{layer}.self_attn.{name}_proj{end}", normed).split(SIZE)
                    to.append([self.turned(self.norm(f"{layer}.self_attn.{name}_norm{end}", h), position) for h in heads])
                v.append(self.of(f"{layer}.self_attn.v_proj{end}", normed).split(SIZE))
            for i, (_, end, _, block) in enumerate(tokens):
                seen = [j for j in range(len(tokens)) if j <= i or block is not None and tokens[j][3] == block]
                heads = []
                for head in range(HEADS):
                    group = head // (HEADS // GROUPS)
                    weight = torch.stack([q[i][head] @ k[j][group] / SIZE**0.5 for j in seen]).softmax(0)
                    heads.append(sum(part * v[j][group] for part, j in zip(weight, seen, strict=True)))
                x[i] = x[i] + self.of(f"{layer}.self_attn.o_proj{end}", torch.cat(heads))
                normed, mlp = self.norm(f"{layer}.post_attention_layernorm{end}", x[i]), f"{layer}.mlp{end}"
                gate, up = (self.of(f"{mlp}.{part}_proj", normed) for part in ("gate", "up"))
                x[i] = x[i] + self.of(f"{mlp}.down_proj", silu(gate) * up)
        return [self.norm(f"language_model.model.norm{end}", state) for state, (_, end, *_) in zip(x, tokens, strict=True)]

    def word(self, number):
        return self.w["language_model.model.embed_tokens.weight"][number]

    def seen(self, image):
        """The tokens of an image that is read."""
        _, height, width = image.shape
        x, at = [], []
        for row in range(height // 14):
            for column in range(width // 14):
                patch = image[:, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14].permute(1, 2, 0).flatten().double()
                net = "vit_model.vision_model"
                at.append(row * 70 + column)
                x.append(self.of(f"{net}.embeddings.patch_embedding", patch))
                x[-1] = x[-1] + self.w[f"{net}.embeddings.position_embedding.weight"][at[-1]]
        x = torch.stack(x)

        def normed(name, x):
            return layer_norm(x, (32,), self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)

        for number in range(2):  # of the three in the file
            block = f"{net}.encoder.layers.{number}"
            y = normed(f"{block}.layer_norm1", x)
            q, k, v = (self.of(f"{block}.self_attn.{name}_proj", y).split(16, dim=-1) for name in "qkv")
            heads = [(a @ b.T / 4).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
            x = x + self.of(f"{block}.self_attn.out_proj", torch.cat(heads, -1))
            y = gelu(self.of(f"{block}.mlp.fc1", normed(f"{block}.layer_norm2", x)), approximate="tanh")
            x = x + self.of(f"{block}.mlp.fc2", y)
        x = self.of("connector.fc1", normed(f"{net}.post_layernorm", x))
        return self.of("connector.fc2", gelu(x, approximate="tanh")) + self.w["vit_pos_embed.pos_embed"][at]

    def velocity(self, ids, x, t, rows):
        waves = [t / 10000 ** (n / 128) for n in range(128)]
        time = torch.tensor([math.cos(a) for a in waves] + [math.sin(a) for a in waves], dtype=torch.float64)
        time = self.of("time_embedder.mlp.2", silu(self.of("time_embedder.mlp.0", time)))
        columns, after = len(x) // rows, len(ids)
        latents = [
            self.of("vae2llm", value.double()) + time + self.w["latent_pos_embed.pos_embed"][n // columns * 64 + n % columns]
            for n, value in enumerate(x)
        ]
        tokens = [(self.word(number), "", n, None) for n, number in enumerate(ids)]
        tokens += [(self.word(MARKS["<|vision_start|>"]), "", after, 0)]
        tokens += [(latent, "_moe_gen", after, 0) for latent in latents]
        tokens += [(self.word(MARKS["<|vision_end|>"]), "", after, 0)]
        states = self.states(tokens)[after + 1 : -1]
        return torch.stack([self.of("llm2vae", state) for state in states])


MARKS = {}


@pytest.fixture(scope="module")
def loop(umm):
    words = umm.captioner.processor.tokenizer
    names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    MARKS.update({name: words.convert_tokens_to_ids(name) for name in names})
    return Loop(umm)


@torch.no_grad()
def test_captions_are_scored_as_by_the_loop(umm, loop):
    words, questions = umm.captioner.processor.tokenizer, ["What is it?", "Say all that you can see in it."]
    context = umm.captioner.prepare(pictures(), questions)
    rollout = umm.captioner.sample(context, 2, Sampling(1.0, 5), range(4))
    found = umm.captioner.logprobs(rollout)
    banned = umm.captioner.learner.network.banned_ids
    assert {MARKS[name] for name in MARKS} - {MARKS["<|im_end|>"]} <= set(banned.tolist())
    assert set(range(len(words), len(words) + 8)) <= set(banned.tolist())
    for row in range(4):
        image = scaled(pictures()[row // 2], umm.captioner.processor.scaling)
        spoken = rollout.tokens_NT[row][rollout.mask_RS[row].bool()].tolist()
        question = words(questions[row // 2], add_special_tokens=False)["input_ids"]
        block = [loop.word(MARKS["<|vision_start|>"]), *loop.seen(image), loop.word(MARKS["<|vision_end|>"])]
        text = [MARKS["<|im_start|>"], *question, MARKS["<|im_end|>"], MARKS["<|im_start|>"], *spoken[:-1]]
        tokens = [(state, "", 0, 0) for state in block] + [(loop.word(n), "", 1 + at, None) for at, n in enumerate(text)]
        logits = loop.of("language_model.lm_head", torch.stack(loop.states(tokens)[-len(spoken) :]))
        logits[:, banned] = -math.inf
        expected = log_softmax(logits, -1).gather(1, torch.tensor(spoken)[:, None])[:, 0]
        torch.testing.assert_close(found[row, : len(spoken)].double(), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_velocities_are_those_of_the_loop(umm, loop):
    """With and without the prompts' keys kept, for prompts of two lengths, under every kind of guidance."""
    network, prompts = umm.captioner.learner.network, umm.conditioner.encode(CAPTIONS)
    x, t = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)), 0.7
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(prompts.ids_NL, prompts.mask_NL, strict=True)]
    assert rows[0] == [MARKS["<|im_start|>"], *umm.conditioner.tokenizer(CAPTIONS[0])["input_ids"], MARKS["<|im_end|>"]]
    c = torch.stack([loop.velocity(ids, one, t, 3) for ids, one in zip(rows, x, strict=True)])
    u = torch.stack([loop.velocity([], one, t, 3) for one in x])
    assert (c - u).abs().max() > 0.01
    t_N = torch.full((2,), t)
    for kept in (None, network.remember(prompts)):
        torch.testing.assert_close(network(prompts, x, t_N, 3, kept).double(), c, atol=1e-5, rtol=0)
    torch.testing.assert_close(network(prompts.without_text(), x, t_N, 3).double(), u, atol=1e-5, rtol=0)


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
@pytest.mark.parametrize(("text", "image", "least"), [(4.0, 1.0, 0.0), (3.0, 1.5, 0.8), (1.0, 2.0, 0.0), (4.0, 1.5, 1.0)])
def test_guidance_is_the_formula_of_every_image(renorm, text, image, least):
    """Lengths of c above and below those of w: both sides of the clamp."""
    noise = torch.Generator().manual_seed(0)
    c, u, i = (torch.randn(2, 5, 4, generator=noise, dtype=torch.float64) for _ in range(3))
    c[1] *= 20
    found = Guidance(text, image, renorm, least)(c, u, i)
    for n in range(2):
        if text == 1:
            assert torch.equal(found[n], c[n])
            continue
        g = u[n] + text * (c[n] - u[n])

        def short(w, over, n=n):
            parts = [(w, c[n])] if over == "global" else list(zip(w, c[n], strict=True))
            scaled = [a * min(1.0, max(least, (b.pow(2).sum().sqrt() / a.pow(2).sum().sqrt()).item())) for a, b in parts]
            return scaled[0] if over == "global" else torch.stack(scaled)

        if renorm == "text_channel":
            expected = i[n] + image * (short(g, "channel") - i[n])
        else:
            expected = short(i[n] + image * (g - i[n]), renorm)
        torch.testing.assert_close(found[n], expected)


def test_patches_are_undone():
    image = torch.randn(2, 4, 6, 4)
    assert torch.equal(unpatched(torch.stack([patches(one, 2) for one in image]), 3, 2), image)
    assert patches(image[0], 2)[1].tolist() == image[0][:, :2, 2:].permute(1, 2, 0).flatten().tolist()


@pytest.mark.parametrize(
    ("given", "expected"),
    [((512, 512), (518, 518)), ((40, 60), (378, 560)), ((3000, 3000), (980, 980)), ((100, 4000), (28, 980))],
)
def test_sizes_of_images_that_are_read(given, expected):
    assert Scaling().size(*given) == expected


# ----------------------------------------------------------------------------------------------------- as a policy


@pytest.mark.parametrize("noise", ["flow", "cps"])
def test_both_ratios_are_one_and_rows_are_independent(umm, noise):
    rollout = umm.captioner.sample(umm.captioner.prepare(pictures()), 2, Sampling(1.0, 8), range(4))
    logp = umm.captioner.logprobs(rollout)
    torch.testing.assert_close(logp, rollout.logp_RS, atol=1e-5, rtol=0)
    alone = umm.captioner.sample(umm.captioner.prepare(pictures()[1:]), 2, Sampling(1.0, 8), [2, 3])
    assert alone.texts == rollout.texts[2:]
    torch.testing.assert_close(umm.captioner.logprobs(alone), logp[2:, : alone.mask_RS.shape[1]], atol=1e-5, rtol=0)

    policy = FlowPolicy(umm.renderer, Exploration(noise=noise))
    assert policy.learner is umm.captioner.learner
    condition = umm.conditioner.encode(CAPTIONS * 2)
    drawn = policy.sample(condition, range(4))
    logp = policy.logprobs(drawn)
    assert logp.shape == (4, 3)
    torch.testing.assert_close(logp, drawn.logp_RS, atol=1e-5, rtol=0)
    one = policy.sample(condition.index([3]), [3])
    torch.testing.assert_close(one.actions_RS, drawn.actions_RS[3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.logprobs(one), logp[3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.pixels(one), policy.pixels(drawn)[3:], atol=1e-5, rtol=0)


def test_drawing_is_euler_at_shifted_times(folder):
    """Noise from the seed, times s t / (1 + (s - 1) t), guidance in its interval only."""
    umm = built(folder, guidance_times=(0.6, 1.0), image_guidance=1.5)
    network, prompts = umm.captioner.learner.network, umm.conditioner.encode(CAPTIONS[:1])
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(7))[None]
    times, guided = [3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25, 0)], []
    with torch.no_grad():
        for t, after in zip(times, times[1:], strict=False):
            c, u = (network(one, x, torch.tensor([t]), 3) for one in (prompts, prompts.without_text()))
            guided.append(t > 0.6)
            x = x - (t - after) * (Guidance(4.0, 1.5)(c, u, c) if guided[-1] else c)
        latents = torch.zeros(1, 4, 6, 4)
        for row in range(3):
            for column in range(2):
                cell = x[0, 2 * row + column].view(2, 2, 4).permute(2, 0, 1)
                latents[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = cell
        image = umm.renderer.autoencoder.decode(latents / 0.3611 + 0.1159).sample / 2 + 0.5
    assert guided == [True, True, True, False]
    found = umm.renderer.render(prompts, [7])
    assert found.std() > 0.05
    torch.testing.assert_close(found, image.clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("half", ["captions", "images"])
@pytest.mark.parametrize("finetune", [LoRA(rank=4), Full()], ids=["lora", "full"])
def test_gradients_reach_what_trains(folder, half, finetune):
    """All of it, and nothing else; computing layers again changes no gradient."""
    umm = built(folder)
    finetune.attach(umm.captioner.learner, keep_reference=False)
    network, policy = umm.captioner.learner.network, FlowPolicy(umm.renderer, Exploration())
    freeze_unreached(network, half)
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    if half == "captions":
        actions, scored = umm.captioner.sample(umm.captioner.prepare(pictures()), 2, Sampling(1.0, 5), range(4)), umm.captioner
    else:
        actions, scored = policy.sample(umm.conditioner.encode(CAPTIONS), [1, 2]), policy
    gradients = []
    for again in (False, True):
        network.zero_grad()
        network.gradient_checkpointing = again
        scored.logprobs(actions).sum().backward()
        gradients.append({name: weight.grad for name, weight in network.named_parameters() if weight.requires_grad})
    assert not [name for name, gradient in gradients[0].items() if gradient is None]
    assert any("_moe_gen" in name for name in gradients[0]) == (half == "images")
    assert not [name for name in gradients[0] if "vision_model" in name]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_it_learns_from_rewards(folder):
    """Adapters on both sets, from one rollout after the other: captions get more of a letter, pictures get redder."""
    umm = built(folder, guidance=1.0, height=32, steps=3, rows=16)
    LoRA(rank=8).attach(umm.captioner.learner, keep_reference=False)
    policy = FlowPolicy(umm.renderer, Exploration(noise_level=1.0))
    optimizer = torch.optim.AdamW([p for p in umm.captioner.learner.network.parameters() if p.requires_grad], lr=1e-2)
    context, prompts = umm.captioner.prepare(pictures()[:1]), umm.conditioner.encode(CAPTIONS[:1] * 16)
    letters, red = [], []
    for step in range(10):
        seeds = range(16 * step, 16 * step + 16)
        rollout, drawn = umm.captioner.sample(context, 16, Sampling(1.0, 5), seeds), policy.sample(prompts, seeds)
        letters.append(torch.tensor([float(text.count("e")) for text in rollout.texts]))
        red.append(policy.pixels(drawn)[:, 0].mean((1, 2)))
        optimizer.zero_grad()
        for scored, actions, reward in ((umm.captioner, rollout, letters[-1]), (policy, drawn, red[-1])):
            advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
            (-(scored.logprobs(actions).sum(1) * advantage).mean()).backward()
        optimizer.step()
    for rewards in (letters, red):
        means = torch.stack(rewards).mean(1)
        assert means[-3:].min() > means[:3].max()
