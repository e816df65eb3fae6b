"""Classifier-free guidance against two passes that are run one by one: u + w (c - u), and one pass where w is 1.

Two kinds of renderers let their guidance be set from outside. Of a `DiffusersRenderer`, the latents after one denoising step
are linear in the velocity, so they have to be those of both passes, mixed. Of an `ImageTokenPolicy`, the difference between
the log-probs of two tokens in the same place is linear in the logits, because the normalisation is the same for both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from uae.check.parts.changed_actions import other_values
from uae.check.parts.verdicts import Found, Precision, at_most, not_applicable
from uae.models.conditioners.states import EmbeddingCondition, TextCondition
from uae.models.flow.policy import FlowPolicy
from uae.models.pipelines.contracts import denoiser_of
from uae.models.renderers.diffusers import Call, DiffusersRenderer, PipelineCondition, generators_of
from uae.models.tokens.policy import ImageTokenPolicy, TokenCondition
from uae.types import Renderer, Trajectory

RESCALED = ("QwenImagePipeline",)  # bring the guided velocity to the length of the conditional one
LOOSE = {True: 1e-3, False: 0.2}  # bound by `Precision.exact`, as a share of the largest difference that guidance makes


def scale(renderer: Renderer) -> float:
    """The guidance w of a renderer; 1 if it is not known."""
    plain = renderer.renderer if isinstance(renderer, FlowPolicy) else renderer
    if isinstance(plain, DiffusersRenderer):
        return max(1.0, plain.rendering.guidance)
    return plain.sampling.guidance if isinstance(plain, ImageTokenPolicy) else 1.0


def passes(renderer: Renderer, condition: Any) -> Found:
    """Rows that the network computes for every image where guidance is 1, in one denoising step or one pass over the tokens."""
    one = _with_guidance(renderer, 1.0)
    if isinstance(one, DiffusersRenderer):
        with _counted(denoiser_of(one.pipe)) as rows:
            _latents(one, condition)
    elif isinstance(one, ImageTokenPolicy):
        taken = one.sample(condition, range(len(condition)))
        with _counted(one.learner.network.base.get_decoder()) as rows, torch.no_grad():
            one.logprobs(taken)
    else:
        return _unknown(renderer)
    return at_most(rows() / len(condition), 1, "guidance 1 needs no second pass")


def value(renderer: Renderer, condition: Any, precision: Precision, taken: Any = None) -> Found:
    """The guided value against u + w (c - u), relative to the largest |w (c - u)|.

    Args:
        renderer: The renderer under test.
        condition: What it draws from.
        precision: What it computes in.
        taken: The actions of an `ImageTokenPolicy`, if it has drawn from this condition before; None draws.
    """
    plain = renderer.renderer if isinstance(renderer, FlowPolicy) else renderer
    if isinstance(plain, DiffusersRenderer):
        if plain.rendering.guidance <= 1:
            return not_applicable("guidance is 1")
        mixed = _of_pipeline(plain, condition)
    elif isinstance(plain, ImageTokenPolicy) and isinstance(condition, TokenCondition):
        if plain.sampling.guidance == 1:
            return not_applicable("guidance is 1")
        mixed = _of_tokens(plain, condition, taken)
    else:
        return _unknown(renderer)
    if isinstance(mixed, str):
        return not_applicable(mixed)
    guided, c, u, w = mixed
    if (c - u).abs().max() <= 1e-5 * u.abs().max():  # what is left is rounding
        return not_applicable("the caption draws what the negative condition draws")
    scale = max(float((w * (c - u)).abs().max()), 1e-6)
    return at_most((guided - u - w * (c - u)).abs().max() / scale, LOOSE[precision.exact], "guidance is not u + w (c - u)")


def _unknown(renderer: Renderer) -> Found:
    return not_applicable(f"the guidance of {type(renderer).__name__} cannot be set from outside")


def _with_guidance(renderer: Renderer, guidance: float) -> Any:
    """The same renderer with another guidance; itself if that cannot be set."""
    plain = copy.copy(renderer.renderer if isinstance(renderer, FlowPolicy) else renderer)
    if isinstance(plain, DiffusersRenderer):
        plain.rendering = replace(plain.rendering, guidance=guidance, guidance_interval=None, steps=1)
    elif isinstance(plain, ImageTokenPolicy):
        plain.sampling = replace(plain.sampling, guidance=guidance)
    return plain


def _of_pipeline(renderer: DiffusersRenderer, condition: PipelineCondition) -> tuple[Tensor, Tensor, Tensor, float] | str:
    """Latents after one step: guided, with the caption, with the negative condition; and the guidance. Or why there are none."""
    negative = renderer.negative() if callable(renderer.negative) else renderer.negative
    if negative is None:
        return "the negative condition is the pipeline's own"
    if type(renderer.pipe).__name__ in RESCALED:
        return f"{type(renderer.pipe).__name__} rescales the guided velocity"
    rows = [0] * len(condition)
    apart: PipelineCondition
    if isinstance(negative, TextCondition):
        apart = TextCondition(negative.texts * len(condition))
    else:
        assert isinstance(negative, EmbeddingCondition)
        apart = negative.index(rows)
    w, one = renderer.rendering.guidance, _with_guidance(renderer, 1.0)
    guided = _latents(_with_guidance(renderer, w), condition)
    return guided, _latents(one, condition), _latents(one, apart), w


def _latents(renderer: DiffusersRenderer, condition: PipelineCondition) -> Tensor:
    """Latents ``[N, ...]`` after the one step of a renderer, float32. All rows start from different noise."""

    def start(rows: list[int]) -> Call:
        return Call(generators_of(rows), output_type="latent")

    drawn = [(row, latents) for rows, part in renderer.calls(condition, start) for row, latents in zip(rows, part, strict=True)]
    return torch.stack([latents for _, latents in sorted(drawn, key=lambda one: one[0])]).float()


@torch.no_grad()
def _of_tokens(
    policy: ImageTokenPolicy, condition: TokenCondition, taken: Trajectory[TokenCondition] | None
) -> tuple[Tensor, Tensor, Tensor, float] | str:
    """Differences between the log-probs of two tokens in one place: guided, with and without the caption; and the guidance."""
    if not policy.sampling.exact:
        return f"cfg_logprob={policy.sampling.cfg_logprob} takes log-probs of another policy than the one that draws, on purpose"
    w, one = policy.sampling.guidance, _with_guidance(policy, 1.0)
    taken = taken or policy.sample(condition, range(len(condition)))
    apart = replace(taken, condition=replace(condition, ids_NL=condition.uncond_ids_NL, mask_NL=condition.uncond_mask_NL))
    actions_RS = taken.actions_RS.clone()
    actions_RS[:, -1] = other_values(taken.actions_RS, taken.mask_RS)[:, -1]  # no later token reads the last one
    if torch.equal(actions_RS, taken.actions_RS):
        return "only one image token was drawn"

    def gap(scored: ImageTokenPolicy, trajectory: Trajectory[TokenCondition]) -> Tensor:
        logp, other = (scored.logprobs(t)[:, -1].float() for t in (trajectory, replace(trajectory, actions_RS=actions_RS)))
        return logp - other

    return gap(policy, taken), gap(one, taken), gap(one, apart), w


@contextmanager
def _counted(network: nn.Module) -> Iterator[Callable[[], int]]:
    """Inside, the rows that a network computes are counted: those of its first input that has some."""
    found: list[int] = []

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(next(len(value) for value in (*arguments, *named.values()) if isinstance(value, Tensor) and value.ndim > 1))

    hook = network.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield lambda: sum(found)
    finally:
        hook.remove()
