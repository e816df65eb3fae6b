"""UniWorld-V1: Qwen2.5-VL-7B, an MLP projector and FLUX.1-dev.

The language model reads the caption as a user's message without a system message. Its final hidden states go through the
projector and are concatenated with T5's states of the same caption. FLUX takes its guidance scale as an input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uae.files.locations import here, local_folder
from uae.models.captioners.loading import Reading
from uae.models.renderers.diffusers import Rendering
from uae.systems.blueprints import Blueprint
from uae.systems.instructions import COMPLETELY
from uae.types import UMM
from uae.weights.placement import Placement
from uae.weights.remote_code import refused

KEY = "model.init_args.system.init_args.checkpoint"
PUBLISHED = "Qwen/Qwen2.5-VL-7B-Instruct"  # of this size
T5_TOKENS = 256  # as in the official code


class UniWorldV1:
    """A `uae.types.System` of the official checkpoint and the remaining parts of FLUX.1-dev.

    Args:
        checkpoint: Folder or hub id: Qwen2.5-VL with ``denoise_tower.{denoise_projector,denoiser,...}``.
        flux: Folder or hub id of FLUX.1-dev, which supplies autoencoder, scheduler, T5 and CLIP.
        with_t5: Whether T5 (256 tokens) and CLIP also read the caption, as in the official code. If False, the language
            model's states are the only path, and CLIP's vector is that of the empty caption.
        siglip: Folder or hub id of google/siglip2-so400m-patch16-512. It gives the renderer features of the *source image*
            beside the caption, as in UniWorld's image editing. This leaks past the text: use it as an upper bound in
            ablations only. None leaves it out.
        condition_tokens: Most tokens of a caption and its template that the language model reads; longer captions are cut.
        text_encoders: Device and dtype of T5 and CLIP.
        reading: Settings with which the captioner is loaded and prompted.
        rendering: Size, steps, guidance and memory settings of the renderer.
    """

    def __init__(
        self,
        checkpoint: str = "LanguageBind/UniWorld-V1",
        flux: str = "black-forest-labs/FLUX.1-dev",
        with_t5: bool = True,
        siglip: str | None = None,
        condition_tokens: int = 1024,
        text_encoders: Placement = Placement(),  # noqa: B008 (frozen)
        reading: Reading = Reading(min_pixels=448 * 448, max_pixels=448 * 448),  # noqa: B008
        rendering: Rendering = Rendering(steps=28, distilled_guidance=3.5),  # noqa: B008
    ) -> None:
        self.checkpoint, self.flux, self.with_t5, self.siglip = checkpoint, flux, with_t5, siglip
        self.condition_tokens, self.text_encoders = condition_tokens, text_encoders
        self.reading, self.rendering = reading, rendering

    def blueprint(self) -> Blueprint:
        """The networks of the system without weights: of the checkpoint if it is on this machine, else of the published sizes."""
        from uae.models.conditioners.states import mlp_projector
        from uae.systems.blueprints import encoder_skeleton, pipeline_skeletons, vlm_skeleton
        from uae.weights.from_state import qwen_model

        draws = self.rendering.placement
        folder = here(self.checkpoint)
        dtype = self.reading.dtype
        policy = qwen_model(folder, getattr(torch, dtype)) if folder else vlm_skeleton(PUBLISHED, dtype)
        names = () if self.with_t5 else ("text_encoder", "text_encoder_2")
        parts = pipeline_skeletons(self.flux, leave_out=names)
        frozen = {name: (part, self.text_encoders if name.startswith("text_encoder") else draws) for name, part in parts.items()}
        width, width_out = policy.config.get_text_config().hidden_size, parts["transformer"].config.joint_attention_dim
        with torch.device("meta"):
            frozen["projector"] = mlp_projector(width, 3 * width_out, width_out).bfloat16(), draws
        if self.siglip is not None:
            frozen["siglip"] = encoder_skeleton(self.siglip, "bfloat16").vision_model, draws
        return Blueprint(
            policy,
            frozen,
            self.rendering,
            condition_tokens=self.condition_tokens + (T5_TOKENS if self.with_t5 else 0),
            reading=self.reading,
            policy_reads=True,
        )

    def build(self) -> UMM:
        """Load the parts on the CPU."""
        from transformers import AutoProcessor

        from uae.models.captioners.loading import assemble_captioner, with_engine
        from uae.models.renderers.diffusers import DiffusersRenderer
        from uae.systems.layouts import uniworld_language_model

        folder = local_folder(self.checkpoint, KEY)
        flux = local_folder(self.flux, "model.init_args.system.init_args.flux")
        model, projectors = uniworld_language_model(folder, getattr(torch, self.reading.dtype), self.reading.attention)
        with refused(self.checkpoint):
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        captioner = assemble_captioner(model, processor, self.reading, COMPLETELY)
        pipe = self._pipeline(folder, flux)
        conditioner = self._conditioner(captioner, projectors, pipe, flux)
        return UMM(with_engine(captioner, self.reading), conditioner, DiffusersRenderer(pipe, self.rendering))

    def _pipeline(self, folder: Path, flux: Path) -> Any:
        """The FLUX pipeline with UniWorld's transformer. Its text encoders are loaded only if they read captions."""
        from uae.models.pipelines.loading import load_pipeline
        from uae.systems.layouts import uniworld_transformer
        from uae.weights.placement import torch_dtype

        placement = self.rendering.placement
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        absent = {} if self.with_t5 else dict.fromkeys(names)
        transformer = uniworld_transformer(folder, torch_dtype(placement), flux)
        return load_pipeline(str(flux), placement, "model.init_args.system.init_args.flux", transformer=transformer, **absent)

    def _conditioner(self, captioner: Any, projectors: dict[str, Any], pipe: Any, flux: Path) -> Any:
        from uae.models.conditioners.joined import JoinedConditioner
        from uae.models.conditioners.prompts import chat_template
        from uae.models.conditioners.states import HiddenStateConditioner
        from uae.models.conditioners.text_encoders import PipelineTextConditioner, empty_pooled

        reads = HiddenStateConditioner(
            lambda: captioner.language_model,
            captioner.processor.tokenizer,
            self._projector(projectors["denoise_projector"], captioner.language_model.config.hidden_size),
            template=chat_template(captioner.processor, role="user", system=False),
            max_tokens=self.condition_tokens,
            pooled="none" if self.with_t5 else empty_pooled(flux, ("",), projected=False),
        )
        text = [PipelineTextConditioner(pipe, T5_TOKENS, self.text_encoders)] if self.with_t5 else []
        image = [self._source_image(projectors, self.siglip)] if self.siglip is not None else []
        return JoinedConditioner([*text, reads, *image], pooled_from=0) if text or image else reads

    def _source_image(self, projectors: dict[str, Any], siglip: str) -> Any:
        from transformers import AutoImageProcessor, SiglipVisionModel

        from uae.models.conditioners.source_image import SourceImageConditioner
        from uae.weights.placement import torch_dtype

        if "siglip_projector" not in projectors:
            raise ValueError(
                f"the checkpoint has no siglip_projector; set model.init_args.system.init_args.siglip to null, or correct {KEY}"
            )
        folder = local_folder(siglip, "model.init_args.system.init_args.siglip")
        dtype = torch_dtype(self.rendering.placement)
        tower = SiglipVisionModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
        images = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        projector = self._projector(projectors["siglip_projector"], tower.config.hidden_size)
        return SourceImageConditioner(tower, images, projector)

    def _projector(self, state: dict[str, Tensor], width_in: int) -> nn.Module:
        from uae.models.conditioners.projector import load_projector
        from uae.weights.placement import torch_dtype

        return load_projector(state, width_in, KEY, "silu").to(torch_dtype(self.rendering.placement))
