"""Rows of the memory plan for images that the policy draws token by token."""

from __future__ import annotations

from typing import Any

from uae.grpo.logprobs import CHUNK
from uae.memory import estimates
from uae.memory.counting import image_update_bytes, text_config
from uae.memory.phases import QUESTION, Sizes
from uae.memory.table import Row
from uae.models.captioners.policy import CaptionPolicy
from uae.rollout import Plan
from uae.systems.blueprints import Blueprint, TokenDrawing

ROWS, MINI = "system.init_args.rows", "model.mini_batches, model.reconstructions"


def image_token_rows(policy: CaptionPolicy, blueprint: Blueprint, sizes: Sizes, settings: Plan) -> list[Row]:
    """Rows for cache and logits while images are drawn and, if images train, for the activations of their log-probs.

    Args:
        policy: The network on the meta device, after the run's finetuning was attached.
        blueprint: Layer sizes of the system. If its ``drawing`` is None, there are no rows.
        sizes: Sizes of a training step in one process.
        settings: Settings of the rollout, of which ``train`` and ``reconstructions`` are used.
    """
    drawing = blueprint.drawing
    if drawing is None:
        return []
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
    reading = estimates.reading_bytes(
        text_config(model), images * with_gradient * length, model.dtype.itemsize, adapted
    )
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
