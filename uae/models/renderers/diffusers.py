"""Condition to image with a frozen diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from uae.models.conditioners.states import EmbeddingCondition, TextCondition, pad_to_length
from uae.models.lengths import alike
from uae.models.pipelines.calls import Call, generators_of
from uae.models.pipelines.contracts import contract_of, denoiser_of, text_encoders_of
from uae.models.pipelines.loading import fresh_scheduler, starting_from, without
from uae.models.pipelines.masks import MaskedJointAttention, masked_cross_attention, masked_passes
from uae.models.pipelines.passes import NegativePass, leaving_out
from uae.models.pipelines.steps import gradient_through
from uae.models.renderers.rendering import KEY, Rendering, check, compile_blocks, multiple, obey_size, spare_memory
from uae.weights.placement import at_work, settle, working_device

PipelineCondition = TextCondition | EmbeddingCondition


class DiffusersRenderer:
    """Renders with a diffusers text-to-image pipeline; implements `uae.types.Renderer`.

    Row n depends on condition n and seed n only: every row draws its noise from its own generator on the CPU, and padding
    is masked, or removed where the pipeline has no mask. The networks must have been loaded in the placement's dtype. The
    autoencoder computes in it too (diffusers converts to float32 those autoencoders that would overflow in float16).

    Args:
        pipe: A diffusers pipeline that takes prompts (TextCondition) or embeddings (EmbeddingCondition).
        rendering: Image size, denoising steps, guidance and settings that save memory.
        negative: Negative condition of classifier-free guidance, one row. Give a function where the conditioner's weights
            train; it is called once per ``render`` with guidance. None is the pipeline's own default, if it has one.
    """

    def __init__(
        self, pipe: Any, rendering: Rendering, negative: PipelineCondition | Callable[[], PipelineCondition] | None = None
    ) -> None:
        self.pipe, self.rendering, self.negative = pipe, rendering, negative
        self.contract = contract_of(pipe)
        self.device: torch.device | None = None  # the policy's device; None is the denoiser's
        check(rendering, pipe, self.contract, negative is not None)
        pipe.set_progress_bar_config(disable=True)
        for name in ("watermark", "safety_checker"):  # they change what encoders see, and stop the gradient
            if getattr(pipe, name, None) is not None:
                setattr(pipe, name, None)
        obey_size(pipe, rendering.height, rendering.width)
        for module in (*self.modules(), *text_encoders_of(pipe).values()):
            module.requires_grad_(False).eval()
        if self.contract.masking == "joint":
            pipe.transformer.set_attn_processor(MaskedJointAttention())
        spare_memory(pipe, rendering)
        if rendering.compile:
            compile_blocks(denoiser_of(pipe))

    def modules(self) -> list[nn.Module]:
        """The frozen networks that take part in drawing: all of the pipeline's except the text encoders."""
        readers = text_encoders_of(self.pipe)
        return [
            part
            for name, part in self.pipe.components.items()
            if isinstance(part, nn.Module) and name not in readers
        ]  # fmt: skip

    def to(self, device: Any) -> DiffusersRenderer:
        """Move the networks to the device that their placement names, and return images on ``device`` from now on."""
        self.device = torch.device(device)
        settle(self.modules(), self.rendering.placement, self.device)
        return self

    def render(self, condition: PipelineCondition, seeds: Sequence[int], grad: bool = False, last: int | None = None) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1], float32.

        Args:
            condition: The condition of N images.
            seeds: One seed per image; equal seeds start from equal noise.
            grad: Whether to keep the graph through the denoising steps. The cold start needs it, rollouts do not.
            last: With ``grad``, number of steps, counted from the last, that the gradient goes through; None is all steps.
                Fewer steps take less memory; the pixels do not change.
        """
        if len(seeds) != len(condition):
            raise ValueError(f"{len(condition)} conditions but {len(seeds)} seeds")
        if last is not None and last < 1:
            raise ValueError(f"last={last} denoising steps with a gradient; allowed: 1 or more, or None for all")
        during = nullcontext if last is None or not grad else partial(gradient_through, last=last)

        def start(rows: list[int]) -> Call:
            return Call(generators_of([seeds[row] for row in rows]), during=during)

        images: list[Tensor] = [torch.empty(0)] * len(condition)
        for rows, drawn in self.calls(condition, start, grad):
            for row, image in zip(rows, self.colours(drawn), strict=True):
                images[row] = image
        return torch.stack(images).to(self.home)

    def colours(self, drawn: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1], float32, from what the pipeline returns: transparency is left out.

        Raises:
            ValueError: The images have another size than the one asked for, or pixels that are not finite.
        """
        size = self.rendering.height, self.rendering.width
        if tuple(drawn.shape[-2:]) != size:
            raise ValueError(
                f"{type(self.pipe).__name__} drew images of {drawn.shape[-2]} x {drawn.shape[-1]} pixels where {size[0]} x {size[1]} "
                f"were asked for; change {KEY}.height and {KEY}.width to a size that it can draw"
            )
        pixels = drawn[:, :3].float()
        if not pixels.isfinite().all():
            raise ValueError(
                f"{type(self.pipe).__name__} drew pixels that are not finite; try float32 or bfloat16: change {KEY}.placement.dtype"
            )
        return (pixels / 2 + 0.5 if self.contract.quirks.signed else pixels).clamp(0, 1)

    @property
    def home(self) -> torch.device:
        """The device of the images that `render` returns."""
        return self.device or _device_of(denoiser_of(self.pipe))

    def calls(
        self, condition: PipelineCondition, start: Callable[[list[int]], Call], grad: bool = False
    ) -> list[tuple[list[int], Tensor]]:
        """Run the pipeline on all rows of a condition.

        Args:
            condition: The condition of N images.
            start: Function from the numbers of some rows to the call that draws them. It is called once for every
                micro-batch, immediately before that runs.
            grad: Whether to keep the graph for a backward pass.

        Returns:
            The rows of each micro-batch and what the pipeline returned for them.
        """
        work = working_device(self.rendering.placement, self.home)
        if grad and self.rendering.placement.offload and work.type != "cpu":
            raise ValueError(
                "the backward pass needs the renderer's weights on their device; set "
                "model.init_args.system.init_args.rendering.placement.offload to false"
            )
        with torch.set_grad_enabled(grad):
            negative = self._negative(condition)
            with at_work(self._needed(condition), self.rendering.placement, self.home):
                return [
                    (rows, self._draw(condition.index(rows), negative, start(rows), grad, work)) for rows in self._batches(condition)
                ]

    def _needed(self, condition: PipelineCondition) -> list[nn.Module]:
        readers = text_encoders_of(self.pipe).values() if isinstance(condition, TextCondition) else ()
        return [*self.modules(), *readers]

    def _negative(self, condition: PipelineCondition) -> PipelineCondition | None:
        """The negative condition, or None if the pipeline runs without guidance or has a default of its own."""
        if self.rendering.guidance <= 1:
            return None
        negative = self.negative() if callable(self.negative) else self.negative
        own = self.contract.own_negative and isinstance(condition, TextCondition)
        if negative is None and not own or negative is not None and type(negative) is not type(condition):
            given = "none" if negative is None else type(negative).__name__
            raise ValueError(
                f"guidance={self.rendering.guidance} needs a negative condition of the kind of the captions' "
                f"({type(condition).__name__}), {given} was given; give one or set "
                "model.init_args.system.init_args.rendering.guidance to 1"
            )
        return negative

    def _batches(self, condition: PipelineCondition) -> Iterator[list[int]]:
        """The numbers of the rows of each micro-batch."""
        most, guided = self.rendering.rows, self.contract.quirks.guided_rows
        if self.rendering.guidance > 1 and guided is not None:
            most = min(most, guided)
        groups = [list(range(len(condition)))]
        sharded = isinstance(denoiser_of(self.pipe), FSDPModule)  # then all processes must make the same number of calls
        if isinstance(condition, TextCondition):
            most = most if self.contract.quirks.read_together else 1
        elif self.contract.masking == "none" and sharded:
            most = 1
        elif self.contract.masking == "none":
            groups = alike(condition.mask_NL.sum(1).tolist(), fewest=1, share=1.0)
        elif self.contract.masking in ("joint", "per_pass") and not sharded:
            image = self.rendering.height * self.rendering.width // multiple(self.pipe) ** 2
            groups = alike((condition.mask_NL.sum(1) + image).tolist(), fewest=8, share=0.75)
        for group in groups:
            yield from (group[start : start + most] for start in range(0, len(group), most))

    def _draw(
        self, condition: PipelineCondition, negative: PipelineCondition | None, start: Call, grad: bool, work: torch.device
    ) -> Tensor:
        """Call the pipeline once."""
        arguments: dict[str, Any] = {**self.contract.fixed, **self._scales()}
        call: Any = type(self.pipe).__call__
        call = call.__wrapped__ if grad else call  # the decorated method disables gradients
        with ExitStack() as stack:
            if isinstance(condition, TextCondition):
                arguments["prompt"] = list(condition.texts)  # some pipelines write into the list
                if isinstance(negative, TextCondition):
                    arguments["negative_prompt"] = negative.texts * len(condition)
            else:
                stack.enter_context(without(self.pipe, text_encoders_of(self.pipe)))
                arguments |= self._embeddings(condition, negative, work, stack)
            if self.rendering.guidance > 1 and self.contract.quirks.negative_first:
                stack.enter_context(leaving_out(denoiser_of(self.pipe), self._negative_pass(len(condition), start)))
            if self.rendering.guidance <= 1:
                stack.enter_context(without(self.pipe, self.contract.guiders))
            if self.contract.quirks.reseeds:
                stack.enter_context(torch.random.fork_rng([work] if work.type == "cuda" else []))
            if hasattr(self.pipe, "prepare_latents"):
                stack.enter_context(starting_from(self.pipe, start.latents))
            elif start.latents is not None:
                arguments["latents"] = start.latents.to(work)
            stack.enter_context(fresh_scheduler(self.pipe))
            stack.enter_context(start.during(self.pipe))
            return call(
                self.pipe,
                **arguments,
                height=self.rendering.height,
                width=self.rendering.width,
                num_inference_steps=self.rendering.steps,
                generator=start.generators or generators_of([0] * len(condition)),  # unused noise, but never the global generator's
                output_type=start.output_type,
                return_dict=False,
            )[0]

    def _scales(self) -> dict[str, float]:
        """The pipeline's arguments for guidance."""
        scales = {}
        if self.contract.guidance:
            scales[self.contract.guidance] = self.contract.guidance_argument(self.rendering.guidance)
        if self.contract.distilled and self.rendering.distilled_guidance is not None:
            scales[self.contract.distilled] = self.rendering.distilled_guidance
        return scales

    def _negative_pass(self, rows: int, start: Call) -> NegativePass:
        seeds = None if start.generators is None else [generator.initial_seed() for generator in start.generators]
        return NegativePass(rows, self.rendering.steps, self.rendering.guidance_interval, start.first, seeds)

    def _embeddings(
        self, condition: EmbeddingCondition, negative: PipelineCondition | None, work: torch.device, stack: ExitStack
    ) -> dict[str, Any]:
        """The pipeline's keyword arguments. Where padding is masked, positive and negative get the same length."""
        if not self.contract.takes_embeddings:
            raise ValueError(
                f"{type(self.pipe).__name__} takes captions as text only, but the conditioner gives embeddings; use a TextConditioner"
            )
        dtype = denoiser_of(self.pipe).dtype
        signed = {"": _on(condition, work, dtype)}
        arguments: dict[str, Any] = {}
        if isinstance(negative, EmbeddingCondition):
            signed = {"negative_": _on(negative, work, dtype).index([0] * len(condition)), **signed}
            if "negative_prompt" in self.contract.negatives:
                arguments["negative_prompt"] = None  # Sana's default is a text, and it refuses both
        signed = self._aligned(signed)
        for sign, one in signed.items():
            arguments[f"{sign}{self.contract.embeddings}"] = _listed(one) if self.contract.masking == "list" else one.embeds_NLD
            if self.contract.pooled:
                arguments[f"{sign}{self.contract.pooled}"] = self._pooled(one)
            if self.contract.mask:
                arguments[f"{sign}{self.contract.mask}"] = self.contract.mask_argument(one.mask_NL, dtype)
        return arguments | self._masked(list(signed.values()), stack)

    def _aligned(self, signed: dict[str, EmbeddingCondition]) -> dict[str, EmbeddingCondition]:
        """Both passes without padding that all rows have, and equally long where padding is hidden from the denoiser."""
        if self.contract.masking != "additive":
            signed = {sign: _unpadded(one) for sign, one in signed.items()}
        length = max(one.embeds_NLD.shape[1] for one in signed.values())
        if self.contract.masking != "none":
            return {sign: pad_to_length(one, length) for sign, one in signed.items()}
        if self.contract.quirks.one_batch and any(one.embeds_NLD.shape[1] != length for one in signed.values()):
            lengths = " and ".join(str(one.embeds_NLD.shape[1]) for one in signed.values())
            raise ValueError(
                f"{type(self.pipe).__name__} draws under guidance from embeddings of equal length only, and the negative and the "
                f"captions have {lengths} tokens; set {KEY}.guidance to 1"
            )
        return signed

    def _masked(self, passes: list[EmbeddingCondition], stack: ExitStack) -> dict[str, Any]:
        """Mask padding during the call. Negatives come first, as in the batches of the pipelines."""
        if self.contract.masking not in ("joint", "cross", "per_pass"):
            return {}
        masks = torch.cat([one.mask_NL for one in passes])
        if masks.all():  # attention without a mask is faster
            return {}
        if self.contract.masking == "joint":
            return {"joint_attention_kwargs": {"text_mask": masks}}
        if self.contract.masking == "cross":
            stack.enter_context(masked_cross_attention(denoiser_of(self.pipe), masks))
        elif self.contract.masking == "per_pass":
            pairs = [(one.embeds_NLD, one.mask_NL) for one in passes]
            stack.enter_context(masked_passes(denoiser_of(self.pipe), pairs))
        return {}

    def _pooled(self, condition: EmbeddingCondition) -> Tensor:
        if condition.pooled_NP is None:
            raise ValueError(
                f"{type(self.pipe).__name__} takes a pooled vector per caption, but the conditioner gives none; change "
                "model.init_args.system"
            )
        return condition.pooled_NP


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _on(condition: EmbeddingCondition, device: torch.device, dtype: torch.dtype) -> EmbeddingCondition:
    pooled = None if condition.pooled_NP is None else condition.pooled_NP.to(device, dtype)
    return EmbeddingCondition(condition.embeds_NLD.to(device, dtype), condition.mask_NL.to(device), pooled)


def _unpadded(condition: EmbeddingCondition) -> EmbeddingCondition:
    """Cut off what is padding in all rows, on the right. Krea2 has its padding before the last tokens."""
    used = condition.mask_NL.bool().any(0).nonzero()
    length = int(used.max()) + 1 if len(used) else 1
    return EmbeddingCondition(condition.embeds_NLD[:, :length], condition.mask_NL[:, :length], condition.pooled_NP)


def _listed(condition: EmbeddingCondition) -> list[Tensor]:
    """One tensor ``[L, D]`` per caption, without padding."""
    return [row[mask.bool()] for row, mask in zip(condition.embeds_NLD, condition.mask_NL, strict=True)]
