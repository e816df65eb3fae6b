"""Images as tokens: an autoregressive model whose image tokens are actions, with classifier-free guidance.

The sampler and the log-probs use one definition of the policy. Let c be the logits after a prompt with the caption, u the
logits after the prompt without it, w the guidance and t the temperature. Then an image token is drawn from

    softmax((u + w (c - u)) / t)

(arXiv 2501.17811, the official inference code). The last layer, from states to logits, is linear. So guidance is applied to
the states before it. That takes one product with the vocabulary instead of two, and w does not amplify rounded logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from uae.grpo import OutputLayer, selected_logprobs
from uae.learner import Learner
from uae.models.captioners.caches import cache_argument, recomputing
from uae.models.captioners.draws import draw, entropy, uniforms
from uae.models.captioners.fixed_cache import FixedLayer, fixed_cache
from uae.models.captioners.policy import CaptionPolicy
from uae.models.captioners.steps import Places, WholeLayer, check_whole
from uae.models.merged import merged
from uae.models.tokens.conditions import TokenCondition, left_padded, positions
from uae.types import Trajectory

LogProb = Literal["guided", "conditional", "guided_detach_uncond"]


@dataclass(frozen=True)
class TokenSampling:
    """How image tokens are drawn. These settings *define* the policy.

    Args:
        guidance: Factor w of classifier-free guidance, 1 or more. 1 is no guidance, and no unconditional pass is run.
        temperature: Temperature t in sampling and in log-probs, 0 or more. 0 is greedy decoding, with log-probs at
            temperature 1.
        cfg_logprob: Which distribution log-probs are taken from under guidance. "guided": the one that is sampled from, with
            its whole gradient. "guided_detach_uncond": the same value at half the memory, without the gradient through u.
            "conditional": softmax(c / t), as in T2I-R1. No token is sampled from that distribution, so the policy gradient
            is biased and the ratio does not start at one (`TokenSampling.exact`).
    """

    guidance: float = 5.0
    temperature: float = 1.0
    cfg_logprob: LogProb = "guided"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of its range.
        """
        if not self.guidance >= 1:
            raise ValueError(f"guidance={self.guidance}; allowed: 1 (none) or more; change model.init_args.system.init_args.guidance")
        if not self.temperature >= 0:
            raise ValueError(
                f"image_temperature={self.temperature}; allowed: 0 (greedy) or any positive number; change "
                "model.init_args.system.init_args.image_temperature"
            )
        if self.cfg_logprob not in get_args(LogProb):
            raise ValueError(
                f"cfg_logprob={self.cfg_logprob!r}; allowed: {', '.join(get_args(LogProb))}; change "
                "model.init_args.system.init_args.cfg_logprob"
            )

    @property
    def policy_temperature(self) -> float:
        """The temperature log-probs are computed at: 1 for greedy decoding."""
        return self.temperature or 1.0

    @property
    def exact(self) -> bool:
        """Whether log-probs are those of the policy that samples, so that the ratio starts at one."""
        return self.guidance == 1 or self.cfg_logprob != "conditional"


class TokenPolicy(CaptionPolicy):
    """One network that writes captions and image tokens with the same weights.

    A subclass defines how image tokens are embedded, and how hidden states are turned into logits of image tokens.
    """

    fed: Literal["inputs_embeds", "input_ids"] = "inputs_embeds"
    """The decoder's argument that `prompt_inputs` and `embed_image` make: embeddings, or ids of one common numbering."""

    @property
    def tokens(self) -> int:
        """S, the number of tokens of an image."""
        raise NotImplementedError

    def image_head(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[V, D]`` and bias ``[V]`` of the last layer, from states to the V image tokens."""
        raise NotImplementedError

    def prompt_inputs(self, ids_NL: Tensor) -> Tensor:
        """What the decoder is fed for a prompt: embeddings ``[N, L, D]``, or ids ``[N, L]`` (see ``fed``)."""
        embeds_NLD: Tensor = self.base.get_input_embeddings()(ids_NL)
        return embeds_NLD

    def embed_image(self, tokens_NS: Tensor) -> Tensor:
        """What the decoder is fed for image tokens: embeddings ``[N, S, D]``, or ids ``[N, S]`` (see ``fed``)."""
        raise NotImplementedError

    def image_states(self, hidden_NSD: Tensor) -> Tensor:
        """The states that `image_head` maps to logits, computed from final hidden states."""
        raise NotImplementedError

    def pixels(self, tokens_NS: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]``, float32 in [0, 1]."""
        raise NotImplementedError

    def forward(self, context: Any, tokens_NT: Tensor, *settings: Any) -> Tensor:
        """Teacher-forced log-probs, float32, with gradient: of captions given images, or of image tokens given captions."""
        if isinstance(context, TokenCondition):
            return self.image_logprobs(context, tokens_NT, *settings)
        return super().forward(context, tokens_NT, *settings)

    def image_logprobs(self, condition: TokenCondition, tokens_NS: Tensor, sampling: TokenSampling) -> Tensor:
        """Log-probs ``[N, S]``; all tokens of an image in one pass."""
        device, guided = self.banned_ids.device, sampling.guidance != 1 and sampling.cfg_logprob != "conditional"
        tokens_NS = tokens_NS.to(device)
        ids_NL, mask_NL, uncond_NL, uncond_mask_NL = left_padded(condition, device)
        u_NSD: Tensor | None = None
        if guided and sampling.cfg_logprob == "guided":
            both = torch.cat([ids_NL, uncond_NL]), torch.cat([mask_NL, uncond_mask_NL]), tokens_NS.repeat(2, 1)
            c_NSD, u_NSD = self._states(*both).chunk(2)
        else:
            if guided:
                with torch.no_grad():
                    u_NSD = self._states(uncond_NL, uncond_mask_NL, tokens_NS)
            c_NSD = self._states(ids_NL, mask_NL, tokens_NS)
        weight_VD, bias_V = self.image_head()
        states_NSD = mixed(c_NSD, u_NSD, sampling.guidance)
        return selected_logprobs(states_NSD, weight_VD, tokens_NS, sampling.policy_temperature, bias=bias_V)

    def _states(self, ids_NL: Tensor, mask_NL: Tensor, tokens_NS: Tensor) -> Tensor:
        """The states ``[N, S, D]`` from which `image_head` predicts every token of the image."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        before_NL, given_NS = self.prompt_inputs(ids_NL), self.embed_image(tokens_NS[:, :-1])
        inputs_NP = torch.cat([before_NL, given_NS.to(before_NL.dtype)], dim=1)
        mask_NP = torch.cat([mask_NL, mask_NL.new_ones(given_NS.shape[:2])], dim=1)
        with recomputing(self.model) if recompute else nullcontext():
            hidden_NPD = self._run(inputs_NP, mask_NP, positions(mask_NP))
        return self.image_states(hidden_NPD[:, ids_NL.shape[1] - 1 :])

    def _run(self, inputs_NP: Tensor, mask_NP: Tensor, position_NP: Tensor, cache: Any = None) -> Tensor:
        """Final hidden states of the language model for what it is fed, with given positions."""
        decoder = self.base.get_decoder()
        return decoder(
            **{self.fed: inputs_NP},
            attention_mask=mask_NP,
            position_ids=position_NP,
            **cache_argument(decoder, cache),
            use_cache=cache is not None,
        ).last_hidden_state

    @torch.no_grad()
    def draw(self, condition: TokenCondition, sampling: TokenSampling, uniform_NS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw image tokens; return them, their log-probs and their entropies, ``[N, S]`` each.

        ``uniform_NS`` holds a uniform number per token; the token is the inverse of the cumulative distribution there.
        Call it on a sharded policy inside `uae.strategy.unsharded` only, because FSDP gathers weights for ``forward`` alone.
        """
        device, guided = self.banned_ids.device, sampling.guidance != 1
        ids_ML, mask_ML, uncond_NL, uncond_mask_NL = left_padded(condition, device)
        if guided:
            ids_ML, mask_ML = torch.cat([ids_ML, uncond_NL]), torch.cat([mask_ML, uncond_mask_NL])
        L, uniform_NS = ids_ML.shape[1], uniform_NS.to(device)
        mask_MP = torch.cat([mask_ML, mask_ML.new_ones(len(ids_ML), self.tokens - 1)], dim=1)
        position_MP, memory = positions(mask_MP), self._memory(mask_ML, self.tokens - 1)
        inputs_MP, start, layer = self.prompt_inputs(ids_ML), 0, self._image_layer(sampling)
        tokens, logps, entropies = [], [], []
        for end in range(L, L + self.tokens):
            hidden_MD = self._fed(inputs_MP, mask_MP[:, :end], position_MP[:, start:end], memory)
            c_ND, *u_ND = self.image_states(hidden_MD).chunk(2 if guided else 1)
            logp_NV = layer(mixed(c_ND, u_ND[0] if guided else None, sampling.guidance)).log_softmax(-1)
            token_N = logp_NV.argmax(-1) if sampling.temperature == 0 else draw(logp_NV, uniform_NS[:, end - L])
            tokens.append(token_N)
            logps.append(logp_NV.gather(1, token_N[:, None])[:, 0])
            entropies.append(entropy(logp_NV))
            inputs_MP, start = self.embed_image(token_N.repeat(len(ids_ML) // len(token_N))[:, None]), end
        return torch.stack(tokens, dim=1), torch.stack(logps, dim=1), torch.stack(entropies, dim=1)

    def _memory(self, mask_ML: Tensor, room: int) -> tuple[Any, Places | None]:
        """An empty cache for prompts and the tokens behind them, and its places if the steps are compiled."""
        if not self.compile_steps:
            return fixed_cache(self.base, lambda: FixedLayer(mask_ML.shape[1] + room)), None
        check_whole(self.base)
        places = Places(mask_ML, room)
        return fixed_cache(self.base, lambda: WholeLayer(places)), places

    def _fed(self, inputs_MP: Tensor, mask_ML: Tensor, position_MP: Tensor, memory: tuple[Any, Places | None]) -> Tensor:
        """Feed P tokens, the last of L, and return the final hidden states ``[M, D]`` of the last one."""
        cache, places = memory
        if places is None or cache.get_seq_length() == 0:
            return self._run(inputs_MP, mask_ML, position_MP, cache)[:, -1]
        for inputs_M1, position_M1 in zip(inputs_MP.split(1, 1), position_MP.split(1, 1), strict=True):
            inputs = {self.fed: inputs_M1.contiguous(), "position_ids": position_M1.contiguous()}
            hidden_M1D = places.step(self.base.get_decoder(), inputs, cache)
        return hidden_M1D[:, -1]

    def _image_layer(self, sampling: TokenSampling) -> OutputLayer:
        """The layer that makes the logits of image tokens, as `image_logprobs` computes them."""
        weight_VD, bias_V = self.image_head()
        return OutputLayer(weight_VD, sampling.policy_temperature, bias_V=bias_V)


class ImageTokenPolicy:
    """Draws images token by token with a `TokenPolicy`; implements `uae.types.ImagePolicy`.

    Row n depends on condition n and seed n only.

    Args:
        learner: The network that draws. If it is also the captioner's learner, captions and images train the same weights.
        sampling: How tokens are drawn and which log-probs they have.
        rows: Number of images that are drawn in one batch. It limits memory and does not change the images.
    """

    def __init__(
        self,
        learner: Learner[TokenPolicy],
        sampling: TokenSampling = TokenSampling(),  # noqa: B008 (frozen)
        rows: int = 16,
    ) -> None:
        if not isinstance(learner.network, TokenPolicy):
            raise TypeError(f"{type(learner.network).__name__} draws no images; give the learner of a TokenPolicy")
        if rows < 1:
            raise ValueError(f"model.init_args.system.init_args.rows={rows}; allowed: 1 or more")
        self.learner, self.sampling, self.rows = learner, sampling, rows

    def to(self, device: torch.device | str) -> ImageTokenPolicy:
        """Move the network, and the frozen copy of its initial weights if there is one."""
        self.learner.to(device)
        return self

    def modules(self) -> list[nn.Module]:
        """An empty list, because the decoder from tokens to pixels is part of the network and has no parameters."""
        return []

    @torch.no_grad()
    def sample(self, condition: TokenCondition, seeds: Sequence[int]) -> Trajectory[TokenCondition]:
        """Draw one image per row. ``logp_RS`` is of the distribution sampled from, whatever `TokenSampling.cfg_logprob` is."""
        if len(seeds) != len(condition):
            raise ValueError(f"{len(condition)} conditions but {len(seeds)} seeds")
        policy = self.learner.network
        with merged(policy.model):
            drawn = [
                policy.draw(condition.index(part), self.sampling, uniforms([seeds[n] for n in part], policy.tokens))
                for part in self._parts(len(seeds))
            ]
        tokens_NS, logp_NS, entropy_NS = (torch.cat(x) for x in zip(*drawn, strict=True))
        return Trajectory(
            mask_RS=torch.ones_like(logp_NS),
            logp_RS=logp_NS,
            entropy_RS=entropy_NS,
            condition=condition,
            actions_RS=tokens_NS,
        )

    def logprobs(self, trajectory: Trajectory[TokenCondition]) -> Tensor:
        """Teacher-forced log-probs ``[N, S]`` under the current weights, with gradient; 0 where masked."""
        logp_NS: Tensor = self.learner.network(trajectory.condition, trajectory.actions_RS, self.sampling)
        return logp_NS.masked_fill(trajectory.mask_RS == 0, 0.0)

    @torch.no_grad()
    def pixels(self, trajectory: Trajectory[TokenCondition]) -> Tensor:
        """The images ``[N, 3, H, W]``, float32 in [0, 1]."""
        tokens_NS, policy = trajectory.actions_RS, self.learner.network
        return torch.cat([policy.pixels(tokens_NS[part.start : part.stop]) for part in self._parts(len(tokens_NS))])

    def render(self, condition: TokenCondition, seeds: Sequence[int], grad: bool = False) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1], float32.

        Raises:
            ValueError: ``grad`` is True, but no gradient passes through a drawn token.
        """
        if grad:
            raise ValueError(
                "images of tokens have no gradient: tokens are discrete; train with log-probs (sample and logprobs), or use a "
                "system whose renderer is a diffusion model"
            )
        return self.pixels(self.sample(condition, seeds))

    def _parts(self, rows: int) -> list[range]:
        return [range(start, min(start + self.rows, rows)) for start in range(0, rows, self.rows)]


def mixed(c_D: Tensor, u_D: Tensor | None, guidance: float) -> Tensor:
    """``u + w (c - u)`` in at least float32; without u, c."""
    dtype = torch.promote_types(c_D.dtype, torch.float32)
    return c_D if u_D is None else u_D.to(dtype) + guidance * (c_D.to(dtype) - u_D.to(dtype))
