"""Image tokens as actions: one policy in sampler and log-probs, compared with plain passes and with enumeration."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from uae.grpo import GRPOLoss
from uae.learner import Learner
from uae.models.captioners.fixed_cache import FixedLayer
from uae.models.tokens.conditions import TokenCondition
from uae.models.tokens.policy import ImageTokenPolicy, TokenPolicy, TokenSampling
from uae.types import Trajectory

CLOSE = {"atol": 1e-5, "rtol": 0}
EXACT = {"atol": 1e-10, "rtol": 0}
PAD, PROMPTS = 0, ([1, 5, 6, 2], [1, 7, 8, 9, 5, 10, 2])  # begin, caption, begin of image
SETTINGS = [TokenSampling(w, 0.7, mode) for w in (1.0, 5.0) for mode in ("guided", "guided_detach_uncond")]


class Toy(TokenPolicy):
    """A Llama with an image vocabulary of its own."""

    def __init__(self, codes=4, tokens=2, dtype=torch.float32, checkpointing=False):
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=64,
                )
            )  # fmt: skip
            model.codes, model.head = nn.Embedding(codes, 16), nn.Linear(16, codes)
            for weight in model.parameters():
                nn.init.normal_(weight, 0 if weight.ndim > 1 else 1, 0.35)
            model.head.weight.data /= 3  # every outcome is possible, also under guidance
        super().__init__(model.to(dtype).eval(), [PAD], checkpointing)
        self.count = tokens

    @property
    def tokens(self):
        return self.count

    def image_head(self):
        return self.model.head.weight, self.model.head.bias

    def embed_image(self, tokens_NS):
        return self.model.codes(tokens_NS)

    def image_states(self, hidden_NSD):
        return hidden_NSD.tanh()

    def pixels(self, tokens_NS):
        return tokens_NS.float()[:, None, None].expand(-1, 3, 2, -1) / len(self.image_head()[0])


def renderer(sampling, rows=16, **settings):
    return ImageTokenPolicy(Learner(Toy(**settings)), sampling, rows)


def condition(prompts=PROMPTS, left=0, right=0):
    """Padded to the longest on the right, and by more on both sides."""
    longest = max(map(len, prompts))
    pad = [([PAD] * left, [PAD] * (longest - len(prompt) + right)) for prompt in prompts]
    ids = [before + list(prompt) + behind for prompt, (before, behind) in zip(prompts, pad, strict=True)]
    bare = [b + [p[0], *[PAD] * (len(p) - 2), p[-1]] + a for p, (b, a) in zip(prompts, pad, strict=True)]
    mask = [[0] * len(b) + [1] * len(p) + [0] * len(a) for p, (b, a) in zip(prompts, pad, strict=True)]
    return TokenCondition(*(torch.tensor(x) for x in (ids, mask, bare, mask)))


def plain_logits(policy, prompt, tokens, detach=False):
    """Logits ``[S, V]`` of one prompt by itself: no padding, no batch, no cache."""
    said = torch.tensor(tokens[:-1], dtype=torch.long)
    embeds = torch.cat([policy.model.model.embed_tokens(torch.tensor(prompt)), policy.model.codes(said)])
    hidden = policy.model.model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
    states = hidden[len(prompt) - 1 :].tanh()
    return policy.model.head(states.detach() if detach else states)


def plain_logprobs(policy, prompt, tokens, sampling, detach=False):
    """log softmax((u + w (c - u)) / t) of the tokens, logits and all, with gradient."""
    c, bare = plain_logits(policy, prompt, tokens), [prompt[0], *[PAD] * (len(prompt) - 2), prompt[-1]]
    u = plain_logits(policy, bare, tokens, detach)
    logits = u + sampling.guidance * (c - u)
    return (logits / sampling.temperature).log_softmax(-1)[range(len(tokens)), tokens]


def fixed(tokens, prompts=PROMPTS, **padding):
    tokens = torch.tensor(tokens)
    given = {"mask_RS": torch.ones(tokens.shape), "logp_RS": torch.zeros(tokens.shape)}
    return Trajectory(**given, condition=condition(prompts, **padding), actions_RS=tokens)


def gradient(policy, value):
    parameters = list(policy.parameters())
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)])


# -------------------------------------------------------------------------------------------------------- one policy


@pytest.mark.parametrize("sampling", SETTINGS)
def test_ratio_is_one(sampling):
    policy = renderer(sampling, tokens=5)
    drawn = policy.sample(condition(), [3, 4])
    logp_NS = policy.logprobs(drawn)
    torch.testing.assert_close(logp_NS.detach(), drawn.logp_RS, **CLOSE)
    assert sampling.exact
    assert logp_NS.requires_grad
    assert logp_NS.dtype == drawn.logp_RS.dtype == torch.float32


@pytest.mark.parametrize("sampling", SETTINGS)
def test_logprobs_equal_plain_passes(sampling):
    policy, tokens = renderer(sampling, tokens=3, dtype=torch.float64), [[1, 3, 2], [0, 2, 2]]
    ours = policy.logprobs(fixed(tokens))
    plain = [plain_logprobs(policy.learner.network, *row, sampling) for row in zip(PROMPTS, tokens, strict=True)]
    torch.testing.assert_close(ours, torch.stack(plain), **EXACT)


def test_conditional_logprobs_are_not_the_samplers():
    """T2I-R1's choice: allowed, and says that it is not exact. Without guidance it is."""
    for guidance, exact in ((1.0, True), (5.0, False)):
        policy = renderer(TokenSampling(guidance, 0.7, "conditional"), tokens=3)
        assert policy.sampling.exact == exact
        drawn = policy.sample(condition(), [3, 4])
        without = TokenSampling(1.0, 0.7)
        plain = [plain_logprobs(policy.learner.network, *row, without) for row in zip(PROMPTS, drawn.actions_RS.tolist(), strict=True)]
        torch.testing.assert_close(policy.logprobs(drawn), torch.stack(plain), **CLOSE)
        assert ((policy.logprobs(drawn) - drawn.logp_RS).abs().max() < 1e-5) == exact


@pytest.mark.parametrize("padding", [{"left": 3}, {"right": 2}, {"left": 1, "right": 4}])
def test_padding_changes_nothing(padding):
    policy = renderer(TokenSampling(5.0, 0.7), tokens=4)
    plain, padded = (policy.sample(condition(**more), [3, 4]) for more in ({}, padding))
    assert torch.equal(plain.actions_RS, padded.actions_RS)
    torch.testing.assert_close(policy.logprobs(padded), policy.logprobs(plain), **CLOSE)


def test_a_row_depends_on_its_prompt_and_seed_only():
    prompts = [*PROMPTS, *PROMPTS]
    together = renderer(TokenSampling(5.0), tokens=6).sample(condition(prompts), [3, 4, 5, 4])
    for rows in (1, 3):
        policy = renderer(TokenSampling(5.0), rows=rows, tokens=6)
        parts = policy.sample(condition(prompts), [3, 4, 5, 4])
        assert torch.equal(parts.actions_RS, together.actions_RS)
    alone = policy.sample(condition(prompts[2:3]), [5])
    assert torch.equal(alone.actions_RS, together.actions_RS[2:3])
    assert torch.equal(together.actions_RS[1], together.actions_RS[3])
    assert not torch.equal(together.actions_RS[0], together.actions_RS[2])
    with pytest.raises(ValueError, match="4 conditions but 1 seeds"):
        policy.sample(condition(prompts), [1])


def test_masked_actions_have_logprob_zero():
    policy = renderer(TokenSampling(5.0), tokens=3)
    masked = replace(fixed([[1, 3, 2], [0, 2, 2]]), mask_RS=torch.tensor([[1.0, 0, 1], [1, 1, 0]]))
    assert ((policy.logprobs(masked) == 0) == (masked.mask_RS == 0)).all()


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        policy = renderer(TokenSampling(5.0), tokens=3, dtype=torch.float64, checkpointing=checkpointing)
        grads.append(gradient(policy.learner.network, policy.logprobs(fixed([[1, 3, 2], [0, 2, 2]])).sum()))
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize(
    ("sampling", "sampler", "scored"),
    [
        (TokenSampling(1.0), {2}, [2]),
        (TokenSampling(5.0), {4}, [4]),
        (TokenSampling(5.0, cfg_logprob="guided_detach_uncond"), {4}, [2, 2]),
        (TokenSampling(5.0, cfg_logprob="conditional"), {4}, [2]),
    ],
)
def test_no_pass_more_than_needed(sampling, sampler, scored):
    """Rows per pass of the decoder: the prompt and S - 1 steps in the sampler; one pass, or one per kind, for log-probs."""
    policy, seen = renderer(sampling, tokens=3), []
    decoder = policy.learner.network.model.model
    decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["inputs_embeds"])), with_kwargs=True)
    drawn = policy.sample(condition(), [3, 4])
    assert set(seen) == sampler
    assert len(seen) == 3
    seen.clear()
    policy.logprobs(drawn)
    assert seen == scored


def test_the_cache_is_allocated_once():
    layer, keys = FixedLayer(5), torch.randn(2, 1, 5, 3)
    first, _ = layer.update(keys[:, :, :3], keys[:, :, :3])
    for step in (3, 4):
        seen, values = layer.update(keys[:, :, step : step + 1], -keys[:, :, step : step + 1])
        assert seen.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        assert torch.equal(seen, keys[:, :, : step + 1])
        assert layer.get_mask_sizes(1) == (step + 2, 0)
    assert torch.equal(values[:, :, 3:], -keys[:, :, 3:])


# -------------------------------------------------------------------------------------------------------- enumeration


def outcomes(codes, tokens):
    return [list(outcome) for outcome in itertools.product(range(codes), repeat=tokens)]


def expected_reward(policy, sampling, rewards, detach=False):
    """Sum over everything that can be drawn, by plain passes. Also the probabilities."""
    logp = [plain_logprobs(policy, PROMPTS[1], o, sampling, detach).sum() for o in outcomes(4, policy.tokens)]
    probability = torch.stack(logp).exp()
    return (probability * rewards).sum(), probability.detach()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_samples_follow_the_policy(guidance):
    policy, count = renderer(TokenSampling(guidance, 0.7), rows=2000), 2000
    drawn = policy.sample(condition([PROMPTS[1]] * count), range(count)).actions_RS
    _, probability = expected_reward(policy.learner.network, policy.sampling, torch.zeros(16))
    observed, expected = torch.bincount(drawn @ torch.tensor([4, 1]), minlength=16), probability * count
    common = expected >= 5
    assert common.sum() >= 3
    chi_square = ((observed - expected)[common] ** 2 / expected[common]).sum()
    assert chi_square < common.sum() + 4 * (2 * common.sum()) ** 0.5


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(
    ("guidance", "mode", "exact"),
    [
        (1.0, "guided", True),
        (1.0, "conditional", True),
        (5.0, "guided", True),
        (5.0, "guided_detach_uncond", False),
        (5.0, "conditional", False),  # T2I-R1's mistake
    ],
)
def test_the_policy_gradient_is_that_of_the_expected_reward(tokens, guidance, mode, exact):
    """The loss at old = new, every outcome weighted by its probability, against autograd through the sum itself."""
    policy = renderer(TokenSampling(guidance, 0.7, mode), tokens=tokens, dtype=torch.float64)
    every = outcomes(4, tokens)
    rewards = torch.randn(len(every), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value, probability = expected_reward(policy.learner.network, policy.sampling, rewards)
    truth = gradient(policy.learner.network, value)
    logp = policy.logprobs(fixed(every, [PROMPTS[1]] * len(every)))
    weights = rewards * probability * logp.numel()  # the loss is a mean over rows, of means over tokens
    loss = GRPOLoss()(logp, logp.detach(), weights, torch.ones_like(logp)).loss
    ours = -gradient(policy.learner.network, loss)
    off = float((ours - truth).norm() / truth.norm())
    assert off < 1e-8 if exact else off > 0.05
    if mode == "guided_detach_uncond":  # exact but for what reaches the states behind u
        held, _ = expected_reward(policy.learner.network, policy.sampling, rewards, detach=True)
        torch.testing.assert_close(ours, gradient(policy.learner.network, held), atol=1e-8, rtol=0)


def test_clipping_acts_once_the_policy_has_moved():
    policy, loss = renderer(TokenSampling(5.0), tokens=4), GRPOLoss()
    drawn = policy.sample(condition([PROMPTS[0]] * 8), range(8))
    old, advantage = policy.logprobs(drawn).detach(), torch.arange(8.0) - 3.5
    terms = loss(policy.logprobs(drawn), old, advantage, drawn.mask_RS)
    assert terms.clip_fraction == 0
    assert terms.ratio_max == pytest.approx(1, abs=1e-5)
    terms.loss.backward()
    torch.optim.SGD(policy.learner.network.parameters(), lr=0.3).step()
    moved = loss(policy.logprobs(drawn), old, advantage, drawn.mask_RS)
    assert moved.ratio_max > 1.2
    assert 0 < moved.clip_fraction < 1


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_rendering_is_sampling_and_has_no_gradient():
    policy = renderer(TokenSampling(5.0), rows=1)
    images = policy.render(condition(), [3, 4])
    assert torch.equal(images, policy.pixels(policy.sample(condition(), [3, 4])))
    assert images.shape == (2, 3, 2, 2)
    with pytest.raises(ValueError, match="tokens are discrete"):
        policy.render(condition(), [3, 4], grad=True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"guidance": 0.5}, r"guidance=0.5; .*system.init_args.guidance"),
        ({"temperature": -1.0}, r"image_temperature=-1.0; .*system.init_args.image_temperature"),
        ({"cfg_logprob": "both"}, r"cfg_logprob='both'; allowed: guided, conditional, guided_detach_uncond"),
    ],
)
def test_settings_without_a_meaning_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        TokenSampling(**setting)


def test_greedy_is_the_most_likely_token_at_every_step():
    policy = renderer(TokenSampling(5.0, 0.0), tokens=3)
    drawn = policy.sample(condition(), [3, 4])
    assert torch.equal(drawn.actions_RS, policy.sample(condition(), [5, 6]).actions_RS)
    for prompt, tokens in zip(PROMPTS, drawn.actions_RS.tolist(), strict=True):
        for step in range(3):
            every = [[*tokens[:step], code] for code in range(4)]
            logp = [plain_logprobs(policy.learner.network, prompt, one, TokenSampling(5.0))[-1] for one in every]
            assert tokens[step] == int(torch.stack(logp).argmax())
