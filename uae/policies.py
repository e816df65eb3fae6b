"""Which of a system's policies learn, and how they are prepared for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn

from uae.learner import Learner
from uae.models.bagel.renderer import BagelRenderer
from uae.models.finetune import Finetune, freeze_unreached
from uae.models.flow.network import FlowNetwork
from uae.models.flow.policy import Exploration, FlowPolicy
from uae.models.pipelines.contracts import denoiser_of, install_denoiser
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.rollout import Train
from uae.types import UMM, ImagePolicy


def prepare(
    umm: UMM,
    train: Train,
    references: Collection[str],
    finetune: Finetune,
    image_finetune: Finetune | None,
    exploration: Exploration | None = None,
) -> UMM:
    """Unfreeze the weights that train, keep the reference weights that losses need, and freeze everything else.

    Args:
        umm: The system as it was built.
        train: Which policies learn from rewards: "captions", "images" or "both".
        references: Segments ("caption", "image") whose loss has a KL term against the initial weights.
        finetune: Which weights train in the captioner, or in the one network that both captions and draws.
        image_finetune: Which weights train in a renderer that has a network of its own. Where captions alone train, an
            adapter or weights in it are what the renderer draws with, frozen; else it has no effect.
        exploration: Which denoising steps of a diffusion renderer are random; without random steps it has no log-probs.
            Renderers that draw image tokens do not need it.

    Returns:
        The system. If images train, its renderer is a policy with log-probs.

    Raises:
        ValueError: The renderer cannot learn, or ``image_finetune`` or ``exploration`` is missing; or ``image_finetune`` has an
            adapter or weights for a renderer that cannot start from them.
    """
    references = {*references, *(["caption"] if umm.needs_reference else [])}
    learner = umm.captioner.learner
    if train == "captions":
        if image_finetune is not None and image_finetune.origin is not None:
            _draw_as_exported(umm, image_finetune)
        finetune.attach(learner, keep_reference="caption" in references)
        freeze_unreached(learner.network, train)
        return umm
    image_policy = _explorer(umm, exploration)
    umm = replace(umm, renderer=image_policy)
    if image_policy.learner is learner:
        if image_finetune is not None and image_finetune.origin is not None:
            raise _no_start(image_finetune, "the captioner's network draws, too")
        finetune.attach(learner, keep_reference=bool(references))
        freeze_unreached(learner.network, train)
        return umm
    finetune.attach(learner, keep_reference="caption" in references)
    if train == "images":  # after attach, so that it keeps an adapter that the run starts from
        learner.network.requires_grad_(False)
    if image_finetune is None:
        raise ValueError(
            f"model.init_args.train={train} needs model.init_args.image_finetune (uae.models.finetune.LoRA or Full): the "
            "renderer has weights of its own"
        )
    image_finetune.attach(image_policy.learner, keep_reference="image" in references)
    return umm


def _draw_as_exported(umm: UMM, image_finetune: Finetune) -> None:
    """Let a renderer that does not train draw with what an earlier run made of its network.

    Raises:
        ValueError: The renderer has no network of its own that could take it.
    """
    policy, renderer = umm.image_policy, umm.renderer
    if policy is not None and policy.learner is umm.captioner.learner:
        raise _no_start(image_finetune, "the captioner's network draws, too")
    if policy is not None:
        learner = policy.learner
    elif isinstance(renderer, DiffusersRenderer):
        if renderer.rendering.placement.dtype == "float8":
            raise _no_start(image_finetune, "model.init_args.system.init_args.rendering.placement.dtype=float8 would round it")
        learner = Learner(FlowNetwork(denoiser_of(renderer.pipe)))
        install_denoiser(renderer.pipe, learner.network)
    else:
        raise _no_start(image_finetune, f"{type(renderer).__name__} has no network of its own that could start from it")
    image_finetune.attach(learner, keep_reference=False)
    learner.network.requires_grad_(False).eval()


def _no_start(image_finetune: Finetune, reason: str) -> ValueError:
    name = "weights" if image_finetune.adapter is None else "adapter"
    return ValueError(f"{image_finetune.key}.{name}={image_finetune.origin}, but {reason}; allowed: null")


def learners(umm: UMM, train: Train) -> dict[str, Learner[Any]]:
    """Who learns, by the names that the LightningModule gives their networks.

    ``policy`` is the captioner, or the one network that captions and draws; ``image_policy`` is a renderer that trains a
    network of its own.
    """
    captioner, image_policy = umm.captioner.learner, umm.image_policy
    if train == "captions" or image_policy is None or image_policy.learner is captioner:
        return {"policy": captioner}
    return {"policy": captioner, "image_policy": image_policy.learner}


def roots(umm: UMM, train: Train) -> list[nn.Module]:
    """The networks that a strategy shards: those of `learners`, and the frozen copies of their initial weights."""
    return [root for learner in learners(umm, train).values() for root in learner.roots()]


def _explorer(umm: UMM, exploration: Exploration | None) -> ImagePolicy[Any]:
    """The renderer as a policy: itself if it has log-probs, else a `FlowPolicy` around it."""
    if umm.image_policy is not None:
        return umm.image_policy
    if exploration is None or not isinstance(umm.renderer, (DiffusersRenderer, BagelRenderer)):
        raise ValueError(
            f"{type(umm.renderer).__name__} has no actions with log-probs, so it cannot learn from rewards: set "
            "model.init_args.exploration (uae.models.flow.policy.Exploration, for flow-matching pipelines), or "
            "model.init_args.train=captions"
        )
    return FlowPolicy(umm.renderer, exploration)
