"""The memory plan of a run: one row per use of memory, with the phases of a training step in which it exists."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from uae.learner import Learner
from uae.memory import estimates
from uae.memory.communication import communication
from uae.memory.drawing import drawing_rows
from uae.memory.phases import QUESTION, Sizes, rollout_rows, update_rows
from uae.memory.processes import Processes, processes_of
from uae.memory.stages import floors
from uae.memory.table import Plan, Row
from uae.memory.weights import encoder_rows, frozen_rows, policy_rows
from uae.models.captioners.policy import CaptionPolicy
from uae.models.finetune import freeze_unreached
from uae.rewards.network import NetworkReward
from uae.systems.blueprints import Blueprint
from uae.types import PlannedSystem


def plan(module: Any, data: Any, trainer: Mapping[str, Any], with_floors: bool = False) -> Plan:
    """Memory of ``fit`` per GPU, unsharded and sharded, computed from layer sizes without reading weights.

    Gradients exist until the next backward pass, so also during the next rollout. Optimizer states exist after the first
    step. Offloaded networks count only in the phase that uses them; networks on another device do not count.

    Args:
        module: An `uae.module.UnifiedGRPO` whose system has a ``blueprint``.
        data: The data module of the run.
        trainer: The settings of ``trainer`` in the configuration.
        with_floors: Whether to count operations, too, which takes some seconds.

    Raises:
        ValueError: The module is of another class, or its system has no blueprint.
    """
    system = getattr(module, "system", None)
    if not isinstance(system, PlannedSystem):
        raise ValueError(
            f"{type(system or module).__name__} has no memory plan; allowed: systems with a blueprint; leave --print_plan out"
        )
    blueprint, processes = system.blueprint(), processes_of(trainer)
    policy, reference = _attached(module, blueprint, processes)
    sizes = _sizes(module, data, blueprint)
    rows = [
        *policy_rows(policy, reference, processes, module.optimizer),
        *frozen_rows(blueprint),
        *encoder_rows(module, sizes),
        *rollout_rows(policy, blueprint, sizes, processes),
        *drawing_rows(policy, blueprint, sizes, module.plan, module.exploration),
        *(update_rows(policy, sizes) if module.plan.train != "images" or blueprint.drawing is None else []),
    ]
    if processes.on_gpu:
        rows.append(Row("CUDA context", whole=estimates.CUDA_CONTEXT))
    exchanges = communication(policy, reference, processes, module.plan.mini_batches, module.batches_per_rollout)
    times = floors(module, blueprint, policy, sizes, processes.accumulate) if with_floors else ()
    return Plan(tuple(rows), processes, _header(blueprint, sizes, module, processes), exchanges, times)


def _attached(module: Any, blueprint: Blueprint, processes: Processes) -> tuple[CaptionPolicy, CaptionPolicy | None]:
    """The blueprint's policy after the run's finetuning was attached, and the reference copy of it or None."""
    recompute = blueprint.reading is not None and blueprint.reading.gradient_checkpointing
    network = copy.deepcopy(blueprint.policy)
    wrap = blueprint.network or (lambda model, again: CaptionPolicy(model, gradient_checkpointing=again))
    learner = Learner(wrap(network, recompute))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns for each weight of an adapter that is copied to the meta device
        shared = blueprint.drawing is not None  # one network: a KL term on captions or on images needs the copy
        compared = bool(module.references) if shared else "caption" in module.references
        module.finetune.attach(learner, keep_reference=compared or blueprint.needs_reference)
        freeze_unreached(learner.network, module.plan.train)
    if processes.cast_to is not None:
        learner.network.to(processes.cast_to)
    return learner.network, next(iter(learner.roots()[1:]), None)


def _sizes(module: Any, data: Any, blueprint: Blueprint) -> Sizes:
    """The sizes of a step. P is the larger one of the blueprint's prompt and of a prompt with an image of the data's size."""
    settings, images = module.plan, getattr(data, "batch_size", 1)
    pixels = getattr(data, "image_size", 0) ** 2
    reading = blueprint.reading
    if reading is not None and pixels:
        pixels = max(pixels, reading.min_pixels or 0)
        pixels = min(pixels, reading.max_pixels or pixels)
    rows = max(images * settings.group, getattr(data, "eval_batch_size", 0))
    prompt = max(blueprint.prompt_tokens, estimates.image_tokens(blueprint.policy, pixels) + QUESTION)
    part = -(-images // settings.mini_batches)
    return Sizes(images, settings.group, rows, part, prompt, settings.sampling.max_tokens, pixels)


def _header(blueprint: Blueprint, sizes: Sizes, module: Any, processes: Processes) -> str:
    drawn = ""
    if blueprint.rendering is not None:
        drawn = f", {blueprint.rendering.height} x {blueprint.rendering.width} pixels in calls of {blueprint.rendering.rows}"
    if module.plan.train != "captions" and blueprint.drawing is None:
        drawn += ", not counting what the renderer's own training takes"
    if asked := [name for name, part in module.reward.parts.items() if isinstance(part, NetworkReward)]:
        drawn += f", not counting the networks of the rewards {', '.join(asked)}"
    guess = f" (trainer.devices is all, none here: {processes.count} assumed)" if processes.assumed else ""
    return (
        f"{type(module.system).__name__} with {type(module.finetune).__name__}: {sizes.images} images x {sizes.group} "
        f"captions per GPU, {sizes.prompt} + {sizes.tokens} tokens, mini-batches of {sizes.part} images{drawn}{guess}"
    )
