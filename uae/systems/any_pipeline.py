"""A system of any vision-language model and any diffusers text-to-image pipeline. The pipeline reads the caption as text."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from uae.models.captioners.loading import Reading
from uae.models.renderers.diffusers import Rendering
from uae.systems.blueprints import Blueprint
from uae.systems.instructions import IN_DETAIL
from uae.types import UMM
from uae.weights.placement import Placement

if TYPE_CHECKING:
    from uae.models.conditioners.states import EmbeddingCondition


class AnyPipeline:
    """A `uae.types.System` of a captioner and an independent text-to-image pipeline.

    Args:
        captioner: Folder or hub id of an image-text-to-text model with a chat template.
        pipeline: Folder or hub id of a diffusers text-to-image pipeline.
        negative_prompt: Prompt from which classifier-free guidance moves away; None is the pipeline's own default.
        caption_tokens: Most tokens of a caption that the pipeline's text encoders read; None is the pipeline's own default.
        text_encoders: Device and dtype of the pipeline's text encoders.
        reading: Settings with which the captioner is loaded and prompted.
        rendering: Size, steps, guidance and memory settings of the renderer.
    """

    def __init__(
        self,
        captioner: str,
        pipeline: str,
        negative_prompt: str | None = None,
        caption_tokens: int | None = None,
        text_encoders: Placement = Placement(),  # noqa: B008 (frozen)
        reading: Reading = Reading(),  # noqa: B008
        rendering: Rendering = Rendering(),  # noqa: B008
    ) -> None:
        self.captioner, self.pipeline, self.negative_prompt = captioner, pipeline, negative_prompt
        self.caption_tokens, self.text_encoders = caption_tokens, text_encoders
        self.reading, self.rendering = reading, rendering

    def blueprint(self) -> Blueprint:
        """The networks of the system without their weights, for memory plans."""
        from uae.systems.blueprints import DRAWS, pipeline_skeletons, vlm_skeleton

        draws = self.rendering.placement
        parts = pipeline_skeletons(self.pipeline)
        frozen = {name: (part, draws if name in DRAWS else self.text_encoders) for name, part in parts.items()}
        return Blueprint(vlm_skeleton(self.captioner, self.reading.dtype), frozen, self.rendering, reading=self.reading)

    def build(self) -> UMM:
        """Load the captioner and the pipeline on the CPU."""
        from uae.models.captioners.loading import load_captioner, with_engine
        from uae.models.conditioners.states import TextConditioner
        from uae.models.conditioners.text_encoders import PipelineTextConditioner
        from uae.models.pipelines.contracts import contract_of
        from uae.models.pipelines.loading import load_pipeline
        from uae.models.renderers.diffusers import DiffusersRenderer

        captioner = with_engine(load_captioner(self.captioner, self.reading, IN_DETAIL), self.reading)
        pipe = load_pipeline(self.pipeline, self.rendering.placement)
        if not contract_of(pipe).takes_embeddings:
            return UMM(captioner, TextConditioner(), DiffusersRenderer(pipe, self.rendering))
        conditioner = PipelineTextConditioner(pipe, self.caption_tokens, self.text_encoders)

        @cache  # the text encoders are frozen; encode at the first use, when they are on their device
        def negative() -> EmbeddingCondition:
            return conditioner.negative(self.negative_prompt)

        return UMM(captioner, conditioner, DiffusersRenderer(pipe, self.rendering, negative))
