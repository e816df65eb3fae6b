"""Which of a system's policies learn, and how they are prepared for it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn

from uae.learner import Network
from uae.models.finetune import Finetune
from uae.models.flow.policy import Exploration, FlowPolicy
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
    """Unfreeze what trains and keep the references it needs; everything else is frozen.

    Args:
        umm: The system as it was built.
        train: Whose actions are rewarded.
        references: Segments ("caption", "image") whose loss compares with the weights the run started from.
        finetune: What trains in the captioner, or in the one network that is captioner and renderer.
        image_finetune: What trains in a renderer with weights of its own.
        exploration: How a diffusion renderer, which has no log-probs of its own, explores; see
            `uae.models.flow.policy.Exploration`. Renderers of image tokens do without.

    Returns:
        The system, with a renderer that has log-probs where it trains.

    Raises:
        ValueError: The renderer cannot learn, or nothing says how.
    """
    references = {*references, *(["caption"] if umm.needs_reference else [])}
    learner = umm.captioner.learner
    if train == "captions":
        finetune.attach(learner, keep_reference="caption" in references)
        freeze_unreached(learner.network, train)
        return umm
    image_policy = _explorer(umm, exploration)
    umm = replace(umm, renderer=image_policy)
    if image_policy.learner is learner:
        finetune.attach(learner, keep_reference=bool(references))
        freeze_unreached(learner.network, train)
        return umm
    finetune.attach(learner, keep_reference="caption" in references)
    if train == "images":  # from the adapter it starts with, if any
        learner.network.requires_grad_(False)
    if image_finetune is None:
        raise ValueError(
            f"model.init_args.train={train} needs model.init_args.image_finetune (uae.models.finetune.LoRA or Full): the "
            "renderer has weights of its own"
        )
    image_finetune.attach(image_policy.learner, keep_reference="image" in references)
    return umm


def networks(umm: UMM, train: Train) -> dict[str, Network]:
    """What a module registers, by its names: ``policy``, and ``image_policy`` if the renderer trains weights of its own."""
    captions = umm.captioner.learner.network
    if train == "captions" or umm.image_policy is None or umm.image_policy.learner is umm.captioner.learner:
        return {"policy": captions}
    return {"policy": captions, "image_policy": umm.image_policy.learner.network}


def roots(umm: UMM, train: Train) -> list[nn.Module]:
    """The networks that a strategy shards: those of `networks`, and the frozen copies of their starts."""
    learners = [umm.captioner.learner]
    if train != "captions" and umm.image_policy is not None and umm.image_policy.learner is not learners[0]:
        learners.append(umm.image_policy.learner)
    return [root for learner in learners for root in learner.roots()]


def freeze_unreached(network: Network, train: Train) -> None:
    """Freeze what only the other half uses: no loss reaches it, and DDP waits for the gradient of all that trains."""
    for half, pattern in network.used_only_for.items():
        if train not in (half, "both"):
            for name, parameter in network.named_parameters():
                if re.search(pattern, name):
                    parameter.requires_grad_(False)


def _explorer(umm: UMM, exploration: Exploration | None) -> ImagePolicy[Any]:
    """The renderer as a policy of images."""
    if umm.image_policy is not None:
        return umm.image_policy
    if exploration is None or not isinstance(umm.renderer, DiffusersRenderer):
        raise ValueError(
            f"{type(umm.renderer).__name__} has no actions with log-probs, so it cannot learn from rewards: set "
            "model.init_args.exploration (uae.models.flow.policy.Exploration, for flow-matching pipelines), or "
            "model.init_args.train=captions"
        )
    return FlowPolicy(umm.renderer, exploration)
