"""Operations and bytes of every stage of a rollout and its update, from which `uae.memory.floors` makes seconds."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from uae.memory import estimates, flops
from uae.memory.counting import text_config
from uae.memory.floors import Floor
from uae.memory.phases import QUESTION, Sizes
from uae.memory.weights import towers_of
from uae.models.captioners.policy import CaptionPolicy
from uae.models.renderers.rendering import Rendering
from uae.rollout import SEGMENTS
from uae.systems.blueprints import DRAWS, Blueprint, StepDrawing, TokenDrawing


def floors(module: Any, blueprint: Blueprint, policy: CaptionPolicy, sizes: Sizes, accumulate: int) -> tuple[Floor, ...]:
    """Floors of all stages.

    Args:
        module: The `uae.module.UnifiedGRPO` that will run.
        blueprint: The networks of its system.
        policy: The captioner's network on the meta device, after the run's finetuning was attached.
        sizes: Sizes of a training step in one process.
        accumulate: Batches per optimizer step, which decide how many mini-batches are replayed.
    """
    counts = _Counts(policy, sizes)
    found = [*_caption(counts), _condition(blueprint, counts), *_render(module, blueprint, counts), _reward(module, sizes, counts)]
    mini_batches, train = module.plan.mini_batches, SEGMENTS[module.plan.train]
    replayed = max(0, mini_batches - accumulate) / mini_batches
    passes = [("reference", name, 1.0) for name in module.references]
    passes += [(stage, name, often) for stage, often in (("replay", replayed), ("update", module.num_iterations)) for name in train]
    for stage, name, often in passes:
        if often and name == "caption":
            found.append(_caption_pass(stage, module, counts, often))
        if often and name == "image" and isinstance(blueprint.drawing, StepDrawing):
            found.append(_step_pass(stage, module, blueprint.drawing, counts, often))
        if often and name == "image" and isinstance(blueprint.drawing, TokenDrawing):
            found.append(_image_pass(stage, module, blueprint.drawing, counts, often))
    return tuple(floor for floor in found if floor.flop or floor.moved)


class _Counts:
    """Operations and bytes of a policy's passes over the images of a rollout."""

    def __init__(self, policy: CaptionPolicy, sizes: Sizes) -> None:
        self.policy, self.sizes = policy, sizes
        decoder, head = policy.base.get_decoder(), policy.base.get_output_embeddings()
        self.text, self.head = estimates.size_of(decoder), estimates.size_of(head)
        tied = head.weight is policy.base.get_input_embeddings().weight
        embeddings = policy.base.get_input_embeddings().weight
        self.text -= embeddings.numel() * embeddings.element_size()  # a few of its rows are read
        aside = policy.used_only_for.get("images")  # weights that captions do not read
        others = (weight for name, weight in decoder.named_parameters() if aside and re.search(aside, name))
        idle = sum(weight.numel() * weight.element_size() for weight in others)
        self.text -= idle
        self.tower = max(0, estimates.size_of(policy) - idle - self.text - self.head * (1 if tied else 2))
        self.rows = sizes.images * sizes.group

    @property
    def weights(self) -> int:
        """Bytes of the language model and its head."""
        return self.text + self.head

    def logprobs(self, learns: bool) -> int:
        """Operations of the log-probs of all captions, and of their gradients."""
        sizes = self.sizes
        tower = flops.tower_flop(self.policy, sizes.pixels, learns) if self.policy.tower_learns else 0
        return sizes.images * (tower + flops.caption_flop(self.policy, sizes.prompt, sizes.tokens, sizes.group, learns))

    def reads(self, learns: bool) -> int:
        """How often a pass reads the weights: forward, and backward and once more for what is computed again."""
        return (3 if self.policy.gradient_checkpointing else 2) if learns else 1

    def of(self, stage: str) -> AbstractContextManager[Any]:
        """Inside, the policy is the one that a stage runs: without its adapter for the reference."""
        model: Any = self.policy.model
        return model.disable_adapter() if stage == "reference" and self.policy.adapted else nullcontext()

    def cache(self, rows: int, prompt: int, steps: int) -> int:
        """Bytes of the cache that tokens read which follow a prompt one by one, in all steps together."""
        return estimates.kv_bytes(self.policy.base, rows, steps * prompt + steps * (steps + 1) // 2)


def _floor(stage: str, part: str, flop: Callable[[], float], moved: float) -> Floor:
    """A floor whose operations are counted now; one without operations, and marked so, if a network is called in another way.

    Systems of users have networks of any library, and a plan must not fail because one of them cannot be counted.
    """
    try:
        return Floor(stage, part, flop(), moved)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
        return Floor(stage, f"{part}, operations not counted".removeprefix(", "), 0.0, moved)


def _caption(counts: _Counts) -> list[Floor]:
    policy, sizes, steps = counts.policy, counts.sizes, counts.sizes.tokens - 1
    head = flops.head_flop(policy) * counts.rows * sizes.tokens
    reads = steps * counts.text + sizes.tokens * counts.head + counts.cache(counts.rows, sizes.prompt, steps)

    def flop() -> float:
        return counts.rows * flops.steps_flop(policy, sizes.prompt, steps) + head + flops.merging_flop(policy)

    return [
        _floor("caption", "image tower", lambda: sizes.images * flops.tower_flop(policy, sizes.pixels), counts.tower),
        _floor("caption", "prompts", lambda: sizes.images * flops.pass_flop(policy, sizes.prompt), counts.text),
        _floor("caption", "tokens, one by one", flop, reads),
    ]


def _condition(blueprint: Blueprint, counts: _Counts) -> Floor:
    tokens = _condition_tokens(blueprint, counts.sizes)
    reads = [part for name, part in blueprint.frozen.items() if name not in DRAWS]
    moved = sum(estimates.placed_bytes(network, placement) for network, placement in reads)

    def flop() -> int:
        own = flops.pass_flop(counts.policy, tokens) if blueprint.policy_reads else 0
        return counts.rows * (own + sum(flops.reader_flop(network, tokens) for network, _ in reads))

    return _floor("condition", "", flop, moved + (counts.text if blueprint.policy_reads else 0))


def _condition_tokens(blueprint: Blueprint, sizes: Sizes) -> int:
    return min(blueprint.condition_tokens, sizes.tokens + QUESTION)


def _render(module: Any, blueprint: Blueprint, counts: _Counts) -> list[Floor]:
    drawn = counts.rows * module.plan.reconstructions
    if isinstance(blueprint.drawing, StepDrawing):
        return _image_steps(blueprint, blueprint.drawing, counts, drawn)
    found = [] if blueprint.drawing is None else [_image_tokens(blueprint.drawing, counts, drawn)]
    rendering, networks = blueprint.rendering, {name: network for name, (network, _) in blueprint.frozen.items()}
    denoiser, vae = networks.get("transformer", networks.get("unet")), networks.get("vae")
    if rendering is None or denoiser is None or vae is None:
        return found
    passes, calls = drawn * rendering.steps * (2 if rendering.guidance > 1 else 1), -(-drawn // rendering.rows)
    shares = blueprint.drawing is None and module.plan.shared_noise and module.plan.train == "captions"
    if rendering.guidance > 1 and shares:
        passes -= drawn - counts.sizes.images * module.plan.reconstructions  # the first negative pass, once for equal noise
    tokens, what = _condition_tokens(blueprint, counts.sizes), f"denoiser, {rendering.steps} steps"
    weights = [estimates.placed_bytes(network, rendering.placement) for network in (denoiser, vae)]
    once = partial(flops.denoiser_flop, denoiser, vae, rendering, tokens)
    return [
        *found,
        _floor("render", what, lambda: passes * once(), calls * rendering.steps * weights[0]),
        _floor("render", "autoencoder", lambda: drawn * flops.decoder_flop(vae, rendering), calls * weights[1]),
    ]


def _image_tokens(drawing: TokenDrawing, counts: _Counts, drawn: int) -> Floor:
    """Images written by the policy; a VQ model that turns tokens into pixels is left out."""
    policy, passes, calls = counts.policy, 2 if drawing.sampling.guidance != 1 else 1, -(-drawn // drawing.rows)
    prompt, steps = counts.sizes.tokens + QUESTION, drawing.written - 1
    head = 2 * drawing.codes * text_config(policy.base).hidden_size * drawing.tokens

    def flop() -> float:
        return drawn * (passes * (flops.pass_flop(policy, prompt) + flops.steps_flop(policy, prompt, steps)) + head)

    reads = calls * (steps + 1) * counts.text + counts.cache(drawn * passes, prompt, steps)
    return _floor("render", "image tokens, one by one", flop, reads)


def _image_steps(blueprint: Blueprint, drawing: StepDrawing, counts: _Counts, drawn: int) -> list[Floor]:
    """Images denoised by the policy, without what latents see of their prompts."""
    policy, calls = counts.policy, -(-drawn // drawing.rows)
    passes, (vae, placement) = drawing.steps + drawing.guided, blueprint.frozen["vae"]
    rendering = Rendering(height=drawing.size[0], width=drawing.size[1], placement=placement)
    moved = calls * estimates.placed_bytes(vae, placement)

    def flop() -> float:
        return drawn * (passes * flops.pass_flop(policy, drawing.written) + flops.pass_flop(policy, counts.sizes.tokens))

    return [
        _floor("render", f"network, {drawing.steps} steps", flop, calls * passes * counts.text),
        _floor("render", "autoencoder", lambda: drawn * flops.decoder_flop(vae, rendering), moved),
    ]


def _step_pass(stage: str, module: Any, drawing: StepDrawing, counts: _Counts, often: float) -> Floor:
    """Log-probs of denoising steps of the policy, and their gradients in the update."""
    policy, learns, drawn = counts.policy, stage == "update", counts.rows * module.plan.reconstructions
    steps = module.exploration.window or drawing.steps - 1
    guided = min(steps, drawing.guided) if module.exploration.guidance_in_update == "guided" else 0

    def flop() -> float:
        with counts.of(stage):
            with_text = flops.pass_flop(policy, counts.sizes.tokens + drawing.written, learns)
            without = flops.pass_flop(policy, drawing.written, learns) if guided else 0
        return often * drawn * (steps * with_text + guided * without)

    return _floor(stage, "images", flop, often * module.plan.mini_batches * counts.reads(learns) * counts.text)


def _caption_pass(stage: str, module: Any, counts: _Counts, often: float) -> Floor:
    """Log-probs of captions, and their gradients in the update."""
    learns = stage == "update"

    def flop() -> float:
        with counts.of(stage):
            return often * counts.logprobs(learns)

    return _floor(stage, "captions", flop, often * module.plan.mini_batches * counts.reads(learns) * counts.weights)


def _image_pass(stage: str, module: Any, drawing: TokenDrawing, counts: _Counts, often: float) -> Floor:
    """Log-probs of images written by the policy, and their gradients in the update."""
    policy, learns, mode = counts.policy, stage == "update", drawing.sampling.cfg_logprob
    length = counts.sizes.tokens + QUESTION + drawing.written - 1
    guided = drawing.sampling.guidance != 1 and mode != "conditional"
    head = (2 if learns else 1) * 2 * drawing.codes * text_config(policy.base).hidden_size * drawing.tokens
    drawn = counts.rows * module.plan.reconstructions

    def flop() -> float:
        with counts.of(stage):
            one = flops.pass_flop(policy, length, learns)
            other = 0 if not guided else one if mode == "guided" else flops.pass_flop(policy, length)
        return often * drawn * (one + other + head)

    return _floor(stage, "images", flop, often * module.plan.mini_batches * counts.reads(learns) * counts.text)


def _reward(module: Any, sizes: Sizes, counts: _Counts) -> Floor:
    """Encoders of rewards, which see the sources once and every reconstruction."""
    images = sizes.images + counts.rows * module.plan.reconstructions
    encoders = [(name, getattr(part, "encoder", None)) for name, part in module.reward.parts.items()]
    towers = [(tower, placement) for _, tower, placement in towers_of(encoders).values()]
    moved = sum(estimates.placed_bytes(tower, placement) for tower, placement in towers)
    return _floor("reward", "", lambda: images * sum(flops.encoder_flop(tower) for tower, _ in towers), moved)
