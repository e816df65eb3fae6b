"""How a diffusers pipeline class takes conditions: read from the class's signatures, and from `uae.models.pipelines.quirks`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uae.models.pipelines.quirks import Masking, Quirks, quirks_of

EMBEDS, POOLED = "prompt_embeds", "pooled_prompt_embeds"
MASKS = ("prompt_attention_mask", "prompt_embeds_mask")
GUIDERS = ("guider", "ocr_guider")


@dataclass(frozen=True)
class Contract:
    """The keyword arguments of a pipeline's ``__call__``, and the outputs of its ``encode_prompt``.

    Args:
        embeddings: Name of the argument for embeddings; None if the pipeline takes only prompts.
        pooled: Name of the argument for one pooled vector per caption, or None.
        mask: Name of the argument for the mask of the embeddings, or None.
        masking: How padding is hidden from the denoiser. "keyword": by the argument ``mask``. "joint": by
            `MaskedJointAttention`. "per_pass": by a mask of text and image tokens that differs between the positive and the
            negative pass. "cross": by a mask for the U-Net's cross-attention. "list": embeddings are a list of one tensor per
            caption, without padding. "additive": the argument ``mask`` only lowers the attention to padding, so padding is never
            cut. "none": there is no mask, so only rows of equal length share a call.
        guidance: Name of the argument for the classifier-free guidance scale, or None.
        distilled: Name of the argument for the guidance scale that a distilled network takes as an input, or None.
        guiders: Names of the components that do classifier-free guidance, with the scale of the checkpoint.
        negatives: Names of the arguments for negative prompts.
        own_negative: Whether guidance on prompts uses a default negative prompt if none is given.
        encoded: Names of the outputs of ``encode_prompt`` that are used, in order.
        fixed: Arguments that are passed in every call.
        quirks: What no signature says.
    """

    embeddings: str | None
    pooled: str | None
    mask: str | None
    masking: Masking
    guidance: str | None
    distilled: str | None
    guiders: tuple[str, ...]
    negatives: tuple[str, ...]
    own_negative: bool
    encoded: tuple[str, ...]
    fixed: Mapping[str, Any]
    quirks: Quirks

    @property
    def takes_embeddings(self) -> bool:
        """Whether the pipeline can draw from an `EmbeddingCondition`."""
        return self.embeddings is not None

    def guidance_argument(self, guidance: float) -> float:
        """The pipeline's number for a guidance scale of which 1 is no guidance."""
        return guidance - 1 if self.quirks.guidance_from_zero else guidance

    def mask_argument(self, mask_NL: Tensor, dtype: torch.dtype) -> Tensor:
        """The mask as the pipeline's own encoders return it; ``dtype`` is the denoiser's."""
        return mask_NL.to({"integer": torch.long, "bool": torch.bool, "float": dtype}[self.quirks.mask_kind])


def contract_of(pipe: Any) -> Contract:
    """The contract of a pipeline, read from its class and, for masks, from its denoiser."""
    kind = type(pipe)
    quirks = quirks_of(kind)
    call = inspect.signature(kind.__call__).parameters
    reads = hasattr(kind, "encode_prompt")
    alone = reads or "prompt" not in call  # a pipeline without prompts takes nothing but embeddings
    embeddings = EMBEDS if alone and _complete(call) and not quirks.text_only else None
    mask = next((name for name in MASKS if name in call), None)
    negatives = tuple(name for name in call if name.startswith("negative_prompt"))
    guidance, distilled = _guidances(call, bool(negatives))
    guiders = tuple(name for name in GUIDERS if name in inspect.signature(kind.__init__).parameters)
    binning = {"use_resolution_binning": False} if "use_resolution_binning" in call else {}
    return Contract(
        embeddings=embeddings,
        pooled=POOLED if POOLED in call else None,
        mask=mask,
        masking=quirks.masking or _masking(pipe, mask, call, quirks),
        guidance=guidance,
        distilled=distilled,
        guiders=guiders,
        negatives=negatives,
        own_negative=guidance == "guidance_scale" or bool(guiders),
        encoded=(quirks.encoded or _encoded(kind)) if embeddings and reads else (),
        fixed={**binning, **quirks.fixed},
        quirks=quirks,
    )


def denoiser_of(pipe: Any) -> Any:
    """The network that takes the denoising steps."""
    transformer = getattr(pipe, "transformer", None)
    return getattr(pipe, "unet", None) if transformer is None else transformer


def install_denoiser(pipe: Any, network: Any) -> None:
    """Let another network take the denoising steps of a pipeline."""
    setattr(pipe, "unet" if getattr(pipe, "transformer", None) is None else "transformer", network)


def text_encoders_of(pipe: Any) -> dict[str, Any]:
    """The networks that read the prompt, by component name."""
    parts = pipe.components.items()
    return {name: part for name, part in parts if name.startswith("text_encoder") and part is not None}


def _complete(call: Any) -> bool:
    """Whether embeddings, one pooled vector and one mask are the only arguments of the call about the caption."""
    known = {sign + name for sign in ("", "negative_") for name in (EMBEDS, POOLED, *MASKS)}
    about = [name for name in call if ("embeds" in name or "mask" in name) and "ip_adapter" not in name]
    return EMBEDS in call and set(about) <= known and "prior_token_ids" not in call


def _guidances(call: Any, negatives: bool) -> tuple[str | None, str | None]:
    """Names of the arguments for classifier-free and for distilled guidance. ``guidance_scale`` can be either of them."""
    scale = "guidance_scale" if "guidance_scale" in call else None
    if "true_cfg_scale" in call:
        return "true_cfg_scale", scale
    if "distilled_guidance_scale" in call:
        return None, "distilled_guidance_scale"
    return (scale, None) if negatives or EMBEDS not in call else (None, scale)


def _masking(pipe: Any, mask: str | None, call: Any, quirks: Quirks) -> Masking:
    if quirks.reads_padding:
        return "none"
    if EMBEDS in call and "list" in str(call[EMBEDS].annotation).lower():
        return "list"
    if mask is not None:
        return "keyword"
    network = type(denoiser_of(pipe)).__name__
    if network == "UNet2DConditionModel":
        return "cross"
    if network == "FluxTransformer2DModel":
        return "per_pass"
    return "joint" if _attends_jointly(denoiser_of(pipe)) else "none"


def _attends_jointly(transformer: Any) -> bool:
    """Whether all attention processors are the standard joint one without a text mask (Stable Diffusion 3)."""
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    from uae.models.pipelines.masks import MaskedJointAttention

    processors = getattr(transformer, "attn_processors", {}).values()
    known = (JointAttnProcessor2_0, MaskedJointAttention)
    return bool(processors) and all(isinstance(processor, known) for processor in processors)


def _encoded(kind: Any) -> tuple[str, ...]:
    takes = inspect.signature(kind.encode_prompt).parameters
    mask = next((name for name in MASKS if name in takes), None)
    if "do_classifier_free_guidance" not in takes:
        return (EMBEDS, *((POOLED,) if POOLED in takes else ()), *((mask,) if mask else ()))
    if POOLED in takes:
        return EMBEDS, f"negative_{EMBEDS}", POOLED, f"negative_{POOLED}"
    if mask:
        return EMBEDS, mask, f"negative_{EMBEDS}", f"negative_{mask}"
    return EMBEDS, f"negative_{EMBEDS}"
