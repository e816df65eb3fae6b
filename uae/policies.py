"""Which of a system's policies learn, and how they are prepared for it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn

from uae.models.finetune import Finetune
from uae.models.flow.policy import Exploration, FlowPolicy
from uae.rollout import Train
from uae.types import UMM


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
        umm: As built.
        train: Whose actions are rewarded.
        references: Segments ("caption", "image") whose loss compares with the weights the run started from.
        finetune: Of the captioner, or of the one network that is captioner and renderer.
        image_finetune: Of a renderer with weights of its own.
        exploration: How a diffusion renderer, which has no log-probs of its own, explores; see
            `uae.models.flow.policy.Exploration`. Renderers of image tokens do without.

    Returns:
        The system, with a renderer that has log-probs where it trains.

    Raises:
        ValueError: The renderer cannot learn, or nothing says how.
    """
    captioner, references = umm.captioner, {*references, *(["caption"] if umm.needs_reference else [])}
    if train == "captions":
        finetune.attach(captioner, keep_reference="caption" in references)
        _freeze_unreached(captioner.policy, train)
        return umm
    umm = replace(umm, renderer=_explorer(umm.renderer, exploration))
    renderer: Any = umm.renderer
    if is_shared(umm):
        finetune.attach(captioner, keep_reference=bool(references))
        _freeze_unreached(captioner.policy, train)
        renderer.reference_policy, renderer.starting_adapter = captioner.reference_policy, captioner.starting_adapter
        return umm
    finetune.attach(captioner, keep_reference="caption" in references)
    if train == "images":  # from the adapter it starts with, if any
        captioner.policy.requires_grad_(False)
    if image_finetune is None:
        raise ValueError(
            f"model.train={train} needs model.image_finetune (uae.models.finetune.LoRA or Full): the renderer has weights of "
            "its own"
        )
    image_finetune.attach(renderer, keep_reference="image" in references)
    return umm


def is_shared(umm: UMM) -> bool:
    """Whether captioner and renderer are one network."""
    return getattr(umm.renderer, "policy", None) is umm.captioner.policy  # type: ignore[attr-defined]


def roots(umm: UMM, train: Train) -> list[nn.Module]:
    """The networks a strategy shards: policies and their frozen copies."""
    owners: list[Any] = [umm.captioner] if train == "captions" else [umm.captioner, umm.renderer]
    found = {id(root): root for owner in owners for root in (owner.policy, owner.reference_policy) if root is not None}
    return list(found.values())


def _freeze_unreached(policy: nn.Module, train: Train) -> None:
    """Freeze what only the other half uses: no loss reaches it, and DDP waits for the gradient of all that trains."""
    for half, names in getattr(policy, "only", {}).items():
        if train not in (half, "both"):
            for name, parameter in policy.named_parameters():
                if re.search(names, name):
                    parameter.requires_grad_(False)


def _explorer(renderer: Any, exploration: Exploration | None) -> Any:
    if hasattr(renderer, "logprobs"):
        return renderer
    if exploration is None:
        raise ValueError(
            f"{type(renderer).__name__} has no actions with log-probs, so it cannot learn from rewards: set "
            "model.exploration (uae.models.flow.policy.Exploration, for flow-matching pipelines), or model.train=captions"
        )
    return FlowPolicy(renderer, exploration)
