"""Rows of the memory plan for images that the policy draws itself: token by token, or by denoising."""

from __future__ import annotations

from typing import Any

from uae.grpo.logprobs import CHUNK
from uae.memory import estimates
from uae.memory.counting import image_update_bytes, steps_update_bytes, text_config
from uae.memory.phases import QUESTION, Sizes
from uae.memory.table import Row
from uae.models.captioners.policy import CaptionPolicy
from uae.models.flow.policy import Exploration
from uae.models.renderers.rendering import Rendering
from uae.rollout import Plan
from uae.systems.blueprints import Blueprint, StepDrawing, TokenDrawing

ROWS, MINI = "system.init_args.rows", "model.mini_batches, model.reconstructions"
STEPS, MARKS = "system.init_args.rendering.rows", 2  # around a caption


def drawing_rows(
    policy: CaptionPolicy, blueprint: Blueprint, sizes: Sizes, settings: Plan, exploration: Exploration | None
) -> list[Row]:
    """Rows for what exists while images are drawn and, if images train, for the activations of their log-probs.

    Args:
        policy: The network on the meta device, after the run's finetuning was attached.
        blueprint: Layer sizes of the system. If its ``drawing`` is None, there are no rows.
        sizes: Sizes of a training step in one process.
        settings: Settings of the rollout, of which ``train`` and ``reconstructions`` are used.
        exploration: Which denoising steps are random; None where images do not train, or are drawn token by token.
    """
    if isinstance(blueprint.drawing, TokenDrawing):
        return _token_rows(policy, blueprint.drawing, sizes, settings)
    if isinstance(blueprint.drawing, StepDrawing):
        return _step_rows(policy, blueprint, blueprint.drawing, sizes, settings, exploration)
    return []


def _step_rows(
    policy: CaptionPolicy, blueprint: Blueprint, drawing: StepDrawing, sizes: Sizes, settings: Plan, exploration: Exploration | None
) -> list[Row]:
    model, (height, width), prompt = policy.base, drawing.size, sizes.tokens + MARKS
    drawn, of = sizes.rows * settings.reconstructions, Rendering(height=height, width=width, placement=drawing.placement)
    at_once, (vae, _) = min(drawing.rows, drawn), blueprint.frozen["vae"]
    denoising = estimates.reading_bytes(text_config(model), at_once * drawing.written, model.dtype.itemsize, policy.adapted)
    rows = [
        Row("reconstructions", drawn * 3 * height * width * 4, phases=("render", "reward"), keys="model.group"),
        Row(f"key-value cache of {at_once} prompts", estimates.kv_bytes(model, at_once, prompt), phases=("render",), keys=STEPS),
        Row(f"denoising buffers, {at_once} rows", denoising, phases=("render",), keys=STEPS),
        Row(
            f"decoding buffers, {at_once} rows", estimates.decode_bytes(vae, of, at_once), phases=("render",),
            device=drawing.placement.device, keys=STEPS,
        ),
    ]  # fmt: skip
    if settings.train == "captions" or exploration is None:
        return rows
    steps = drawing.steps - 1 if exploration.window is None else exploration.window
    guided = min(steps, drawing.guided) if exploration.guidance_in_update == "guided" else 0
    images, kinds = sizes.part * sizes.group * settings.reconstructions, 1 if exploration.ratio == "density" else 2
    keys = f"{MINI}, model.exploration.window"
    again = "" if policy.gradient_checkpointing else ", reading.gradient_checkpointing"
    kept = images * steps_update_bytes(policy, prompt, drawing.written, steps, guided)
    phases = ("render", "reward", "replay", "update")
    return [
        *rows,
        Row("latents of the steps", drawn * (kinds * steps + 2) * drawing.latents * 4, phases=phases, keys=keys),
        Row("image activations", kept, phases=("update",), keys=keys + again),
        Row("image replay buffers", denoising + denoising * prompt // drawing.written, phases=("replay",), keys=STEPS),
    ]


def _token_rows(policy: CaptionPolicy, drawing: TokenDrawing, sizes: Sizes, settings: Plan) -> list[Row]:
    drawn, prompt = sizes.rows * settings.reconstructions, sizes.tokens + QUESTION
    at_once = min(drawing.rows, drawn)
    passes = at_once * (2 if drawing.sampling.guidance != 1 else 1)
    rows = [
        Row("reconstructions", drawn * 3 * drawing.pixels * 4, phases=("render", "reward"), keys="model.group"),
        Row(
            f"key-value cache of {at_once} images",
            estimates.kv_bytes(policy.base, passes, prompt + drawing.written - 1),
            phases=("render",),
            keys=ROWS,
        ),
        Row("logits of an image token", 20 * at_once * drawing.codes, phases=("render",), keys=ROWS),
    ]
    if settings.train == "captions":
        return rows
    return rows + _update_rows(policy, drawing, prompt, sizes.part * sizes.group * settings.reconstructions)


def _update_rows(policy: CaptionPolicy, drawing: TokenDrawing, prompt: int, images: int) -> list[Row]:
    model, mode = policy.base, drawing.sampling.cfg_logprob
    guided = drawing.sampling.guidance != 1 and mode != "conditional"
    length = prompt + drawing.written - 1
    with_gradient = 2 if guided and mode == "guided" else 1
    kept = images * image_update_bytes(policy, prompt, drawing.written, with_gradient)
    adapted = policy.adapted
    reading = estimates.reading_bytes(text_config(model), images * with_gradient * length, model.dtype.itemsize, adapted)
    keys = MINI if policy.gradient_checkpointing else f"{MINI}, reading.gradient_checkpointing"
    return [
        Row("image activations", kept, phases=("update",), keys=keys),
        Row("image head", _head_bytes(model, images * drawing.tokens, drawing.codes), phases=("update", "replay"), keys=MINI),
        Row("image replay buffers", reading, phases=("replay",), keys=MINI),
    ]


def _head_bytes(model: Any, tokens: int, codes: int) -> int:
    """Bytes of three float32 ``[chunk, V]`` at a time and, per token, of a float32 state and its gradient."""
    width = text_config(model).hidden_size
    return 3 * 4 * min(tokens, CHUNK) * codes + 2 * 4 * tokens * width
