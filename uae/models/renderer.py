"""Condition to image with a frozen diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uae.models.conditioners import EmbeddingCondition, TextCondition, pad_to_length
from uae.models.joint_attention import MaskedJointAttention


class DiffusersRenderer:
    """Renders with a diffusers text-to-image pipeline; implements `uae.types.Renderer`.

    Row n depends on condition n and seed n only: every row draws its noise from its own generator, and padding is
    masked. The negative condition is computed by the caller once; guidance of 1 skips its pass.

    Args:
        pipe: A pipeline that takes prompts (TextCondition) or ``prompt_embeds`` (EmbeddingCondition).
        height, width: In pixels.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 means none.
        negative: One row, for guidance above 1 with embeddings. Strings use the pipeline's own default.
        rows: Rows per pipeline call; bounds memory.
    """

    def __init__(
        self,
        pipe: Any,
        height: int,
        width: int,
        steps: int = 28,
        guidance: float = 1.0,
        negative: EmbeddingCondition | None = None,
        rows: int = 64,
    ) -> None:
        if guidance > 1 and negative is None and getattr(pipe, "tokenizer", None) is None:
            raise ValueError(f"guidance={guidance} needs a negative condition; give one or set renderer guidance to 1")
        self.pipe, self.height, self.width = pipe, height, width
        self.steps, self.guidance, self.negative, self.rows = steps, guidance, negative, rows
        pipe.set_progress_bar_config(disable=True)
        for module in self.modules():
            module.requires_grad_(False).eval()
        self.masked = _attends_jointly(pipe.transformer)
        if self.masked:
            pipe.transformer.set_attn_processor(MaskedJointAttention())

    def modules(self) -> list[torch.nn.Module]:
        """The frozen networks."""
        return [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.modules()[0].parameters()).device

    def to(self, device: Any) -> DiffusersRenderer:
        """Move the networks."""
        self.pipe.to(device)
        if self.negative is not None:
            n = self.negative
            pooled = None if n.pooled_NP is None else n.pooled_NP.to(device)
            self.negative = EmbeddingCondition(n.embeds_NLD.to(device), n.mask_NL.to(device), pooled)
        return self

    def render(self, condition: TextCondition | EmbeddingCondition, seeds: Sequence[int], grad: bool = False) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1].

        Args:
            condition: N rows.
            seeds: N numbers; equal seeds start from equal noise.
            grad: Keep the graph through every denoising step (cold start); off in rollouts.
        """
        if len(seeds) != len(condition):
            raise ValueError(f"{len(condition)} conditions but {len(seeds)} seeds")
        images = []
        with torch.set_grad_enabled(grad):
            for start in range(0, len(condition), self.rows):
                rows = range(start, min(start + self.rows, len(condition)))
                images.append(self._call(condition.index(rows), [seeds[row] for row in rows], grad))
        return torch.cat(images).float()

    def _call(self, condition: TextCondition | EmbeddingCondition, seeds: Sequence[int], grad: bool) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on any device
        prompt = {"prompt": condition.texts} if isinstance(condition, TextCondition) else self._embeds(condition)
        call = type(self.pipe).__call__
        call = call.__wrapped__ if grad else call  # the undecorated method: diffusers disables gradients in the other
        return call(
            self.pipe,
            **prompt,
            height=self.height,
            width=self.width,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=generators,
            output_type="pt",
            return_dict=False,
        )[0]

    def _embeds(self, condition: EmbeddingCondition) -> dict[str, Any]:
        """The pipeline's keyword arguments; positive and negative padded to one length, both masked."""
        arguments: dict[str, Any] = {}
        masks = [condition.mask_NL]
        if self.guidance > 1 and self.negative is not None:
            length = max(condition.mask_NL.shape[1], self.negative.mask_NL.shape[1])
            condition = pad_to_length(condition, length)
            negative = pad_to_length(self.negative, length).index([0] * len(condition))
            masks = [negative.mask_NL, condition.mask_NL]
            arguments["negative_prompt_embeds"] = negative.embeds_NLD
            arguments["negative_pooled_prompt_embeds"] = negative.pooled_NP
        arguments["prompt_embeds"] = condition.embeds_NLD
        arguments["pooled_prompt_embeds"] = condition.pooled_NP
        if self.masked:
            arguments["joint_attention_kwargs"] = {"text_mask": torch.cat(masks)}
        return arguments


def _attends_jointly(transformer: Any) -> bool:
    """Whether every attention is the stock joint one, which lacks a text mask (Stable Diffusion 3)."""
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    processors = getattr(transformer, "attn_processors", {}).values()
    known = (JointAttnProcessor2_0, MaskedJointAttention)
    return bool(processors) and all(isinstance(processor, known) for processor in processors)
