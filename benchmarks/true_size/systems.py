"""Systems at their published sizes with random weights, made from configurations alone: nothing is read, nothing is downloaded.

Words stand in for the tokens of the published vocabularies, one token per word, so a caption of T tokens is read as T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import nn

from uae.encoders import HFEncoder
from uae.encoders.preprocessing import Preprocessing, from_image_processor
from uae.miniature import tiny, tiny_janus
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.loading import Reading
from uae.models.conditioners.joined import JoinedConditioner
from uae.models.conditioners.prompts import chat_template
from uae.models.conditioners.states import HiddenStateConditioner, mlp_projector
from uae.models.conditioners.text_encoders import PipelineTextConditioner
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.rendering import Rendering
from uae.models.tokens.janus import unify
from uae.rehearsal.tokenizers import clip_tokenizer, t5_tokenizer
from uae.systems.blueprints import Blueprint, config_of, denoiser_skeleton, encoder_skeleton, vae_skeleton, vlm_skeleton
from uae.systems.janus_pro import JanusPro
from uae.systems.uniworld_v1 import T5_TOKENS, UniWorldV1
from uae.types import UMM, System

QUESTION, NEGATIVE = tiny.INSTRUCTION, "small"
QWEN_3B, JANUS_7B, CLIP = "Qwen/Qwen2.5-VL-3B-Instruct", "deepseek-community/Janus-Pro-7B", "openai/clip-vit-large-patch14"
SD3, SANA = "stabilityai/stable-diffusion-3.5-{}", "Efficient-Large-Model/Sana_600M_512px_diffusers"
FLUX = "black-forest-labs/FLUX.1-dev"


@dataclass(frozen=True)
class Work:
    """Where a system is made, and how much it draws.

    Args:
        device: "cpu" or "cuda"; weights are made where they are used.
        size: Height and width of source images and of reconstructions, in pixels.
        steps: Denoising steps.
    """

    device: str
    size: int
    steps: int

    def rendering(self, guidance: float = 1.0) -> Rendering:
        """Settings of the renderer."""
        return Rendering(self.size, self.size, self.steps, guidance)


class OwnReading:
    """Qwen2.5-VL whose own hidden states of a caption condition a diffusers pipeline: UAE, and UAE with other renderers.

    Args:
        pipeline: Hub id of a Stable Diffusion 3.5 or a Sana.
        work: Where it is made, and how much it draws.
    """

    def __init__(self, pipeline: str, work: Work) -> None:
        self.pipeline, self.work, self.rendering = pipeline, work, work.rendering(guidance=5.0)

    def blueprint(self) -> Blueprint:
        """As `uae.systems.uae.UAE`, with another pipeline; prompts are as long as the images of the data make them."""
        policy, transformer = vlm_skeleton(QWEN_3B), denoiser_skeleton(self.pipeline)
        config, width = transformer.config, policy.config.get_text_config().hidden_size
        width_out = config.caption_channels if "Sana" in type(transformer).__name__ else config.joint_attention_dim
        with torch.device("meta"):
            projector = mlp_projector(width, 2 * width_out, width_out).bfloat16()
        frozen: dict[str, Any] = {"projector": projector, "transformer": transformer, "vae": vae_skeleton(self.pipeline)}
        placed = {name: (module, self.rendering.placement) for name, module in frozen.items()}
        return Blueprint(policy, placed, self.rendering, 1, 1024, Reading(), policy_reads=True)

    def build(self) -> UMM:
        """All parts with random weights."""
        parts, device = self.blueprint(), self.work.device
        captioner = qwen_captioner(parts.policy, device)
        projector, transformer, vae = (filled(parts.frozen[name][0], device) for name in ("projector", "transformer", "vae"))
        pooled = getattr(transformer.config, "pooled_projection_dim", None)
        conditioner = HiddenStateConditioner(
            lambda: captioner.language_model,
            captioner.processor.tokenizer,
            projector,
            chat_template(captioner.processor, role="generate"),
            1024,
            torch.zeros(pooled, device=device) if pooled else "none",
        )
        pipe = _sana(transformer, vae) if pooled is None else _sd3(transformer, vae)
        negative = torch.no_grad()(lambda: conditioner.encode([NEGATIVE]))
        return UMM(captioner, conditioner, DiffusersRenderer(pipe, self.rendering, negative))


def _sd3(transformer: Any, vae: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    absent: dict[str, Any] = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **absent)


def _sana(transformer: Any, vae: Any) -> Any:
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    absent: dict[str, Any] = {"tokenizer": None, "text_encoder": None}
    return SanaPipeline(transformer=transformer, scheduler=scheduler, vae=vae, **absent)


class UniWorld:
    """UniWorld-V1: Qwen2.5-VL-7B and T5 read, FLUX.1-dev draws."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.planned = UniWorldV1(rendering=replace(work.rendering(), distilled_guidance=3.5))

    def blueprint(self) -> Blueprint:
        """That of the system itself."""
        return replace(self.planned.blueprint(), prompt_tokens=1)

    def build(self) -> UMM:
        """All parts with random weights."""
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        parts, device = self.blueprint(), self.work.device
        captioner = qwen_captioner(parts.policy, device, self.planned.reading)
        made = {name: filled(network, device) for name, (network, _) in parts.frozen.items()}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        pipe = FluxPipeline(
            scheduler, made["vae"], made["text_encoder"], clip_tokenizer(), made["text_encoder_2"], t5_tokenizer(512),
            made["transformer"],
        )  # fmt: skip
        reads = HiddenStateConditioner(
            lambda: captioner.language_model, captioner.processor.tokenizer, made["projector"],
            chat_template(captioner.processor), 1024, "none",
        )  # fmt: skip
        conditioner = JoinedConditioner([PipelineTextConditioner(pipe, T5_TOKENS), reads], pooled_from=0)
        return UMM(captioner, conditioner, DiffusersRenderer(pipe, self.planned.rendering))


class Janus:
    """Janus-Pro-7B, which captions and draws with one network. Its images have a size of their own."""

    def __init__(self, work: Work) -> None:
        self.work, self.planned = work, JanusPro(JANUS_7B, reading=Reading(gradient_checkpointing=True))

    def blueprint(self) -> Blueprint:
        """That of the system itself."""
        return self.planned.blueprint()

    def build(self) -> UMM:
        """The one network with random weights."""
        from transformers import JanusImageProcessor, JanusProcessor

        model = filled(self.blueprint().policy, self.work.device)
        text, vision = model.config.get_text_config(), model.config.vision_config
        vocabulary = words(tiny_janus.VOCABULARY, text.vocab_size)
        images = {"image_token": tiny_janus.IMAGE, "boi_token": tiny_janus.IMAGE_BEGIN, "eoi_token": tiny_janus.IMAGE_END}
        tokenizer = tiny.word_level(
            vocabulary, tiny_janus.UNKNOWN, bos_token=tiny_janus.BEGIN, eos_token=tiny_janus.END, pad_token=tiny_janus.PAD,
            extra_special_tokens=images,
        )  # fmt: skip
        model.config.image_token_id = vocabulary.index(tiny_janus.IMAGE)
        side, half = {"height": vision.image_size, "width": vision.image_size}, [0.5] * 3
        pixels = JanusImageProcessor(size=side, min_size=1, image_mean=half, image_std=half)
        tokens = (vision.image_size // vision.patch_size) ** 2
        processor = JanusProcessor(pixels, tokenizer, chat_template=tiny_janus.CHAT_TEMPLATE, num_image_tokens=tokens)
        model.generation_config.eos_token_id = vocabulary.index(tiny_janus.END)
        captioner = HFCaptioner(model, processor, QUESTION, extra_banned_ids=range(vocabulary.index(tiny_janus.UNKNOWN) + 1))
        captioner.learner.network.gradient_checkpointing = self.planned.reading.gradient_checkpointing
        return unify(captioner, self.planned.sampling, self.planned.rows, tiny_janus.TEMPLATE)


CASES: dict[str, Callable[[Work], System]] = {
    "qwen2.5-vl-3b + sd3.5-medium": lambda work: OwnReading(SD3.format("medium"), work),
    "qwen2.5-vl-3b + sana-0.6b": lambda work: OwnReading(SANA, work),
    "uae": lambda work: OwnReading(SD3.format("large"), work),
    "uniworld-v1": UniWorld,
    "janus-pro-7b": Janus,
}
DEFAULT = {"cpu": ("qwen2.5-vl-3b + sd3.5-medium",), "cuda": ("uae", "uniworld-v1", "janus-pro-7b")}  # by device


class RandomEncoder(HFEncoder):
    """An image encoder of a published configuration with random weights."""

    def read(self) -> tuple[nn.Module, Preprocessing]:
        """Made, not read."""
        from transformers import CLIPImageProcessor

        side = config_of(self.path)["vision_config"].get("image_size", 224)
        sizes: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        return filled(encoder_skeleton(self.path), "cpu"), from_image_processor(CLIPImageProcessor(**sizes).to_dict())


def qwen_captioner(skeleton: Any, device: str, reading: Reading = Reading()) -> HFCaptioner:  # noqa: B008 (frozen)
    """Qwen2.5-VL with a processor that cuts images as the published one does. No token ends a caption."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    model = filled(skeleton, device)
    vision, vocabulary = model.config.vision_config, words(tiny.VOCABULARY, model.config.get_text_config().vocab_size)
    sizes: dict[str, Any] = {"patch_size": vision.patch_size, "temporal_patch_size": 2, "merge_size": vision.spatial_merge_size}
    pixels = {"shortest_edge": reading.min_pixels or 3136, "longest_edge": reading.max_pixels or 12845056}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **sizes), tokenizer=tiny.tokenizer(vocabulary),
        video_processor=Qwen2VLVideoProcessor(**sizes), chat_template=tiny.CHAT_TEMPLATE,
    )  # fmt: skip
    names = {"image": tiny.IMAGE, "video": tiny.VIDEO, "vision_start": tiny.VISION_START, "vision_end": tiny.VISION_END}
    for name, word in names.items():
        setattr(model.config, f"{name}_token_id", vocabulary.index(word))
    model.generation_config.eos_token_id = vocabulary.index(tiny.END)
    return HFCaptioner(model, processor, QUESTION, extra_banned_ids=range(len(tiny.SPECIALS)))


def words(first: list[str], count: int) -> list[str]:
    """A vocabulary of so many words."""
    return [*first, *(f"w{number}" for number in range(count - len(first)))]


def filled(skeleton: Any, device: str) -> Any:
    """A network as a skeleton on the meta device, with random weights: matrices of std 0.02, norms of 1, biases of 0."""
    with torch.device(device), _empty():
        network = _created(skeleton, device)
    noise = torch.Generator(device).manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.02, generator=noise)
        else:
            weight.data.fill_(float(name.endswith("weight")))
    return network.requires_grad_(False).eval()


def _created(skeleton: Any, device: str) -> Any:
    """The network's class is called again, because buffers without a place in checkpoints have values only then."""
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    if isinstance(skeleton, PreTrainedModel):
        network: Any = type(skeleton)._from_config(skeleton.config, dtype=skeleton.dtype)
        for name in ("text_model", "text_projection"):
            if getattr(skeleton, name, network) is None:
                setattr(network, name, None)
        return network
    if isinstance(skeleton, ModelMixin):
        with _default(skeleton.dtype):
            made: Any = type(skeleton).from_config(skeleton.config)
        return nn.Module.to(made, skeleton.dtype)
    return copy.deepcopy(skeleton).to_empty(device=device)


@contextmanager
def _empty() -> Iterator[None]:
    """Inside, constructors fill no weights with random numbers, which would be overwritten anyway."""
    with mock.patch.multiple(torch.Tensor, normal_=_unchanged, uniform_=_unchanged):
        yield


def _unchanged(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
