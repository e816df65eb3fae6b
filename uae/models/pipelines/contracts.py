"""How a diffusers pipeline class takes conditions. Most of it is read from the class's signatures, the rest from two tables.

The tables hold for diffusers 0.42. Classes that are not in the tables get one caption per call, which is safe but slower.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

Masking = Literal["keyword", "joint", "per_pass", "cross", "none"]

EMBEDS, POOLED = "prompt_embeds", "pooled_prompt_embeds"
MASKS = ("prompt_attention_mask", "prompt_embeds_mask")
# Pipelines in which the embeddings of a caption do not depend on the other captions of the batch. All others get one caption
# per call: CogView4 pads to the longest caption without a mask, OmniGen uses the positions of the first row for all rows.
_READ_TOGETHER = {
    "StableDiffusion3Pipeline", "FluxPipeline", "SanaPipeline", "SanaSprintPipeline", "QwenImagePipeline",
    "StableDiffusionXLPipeline", "StableDiffusionPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline",
}  # fmt: skip
# Pipelines that call the denoiser once per step under guidance, with all rows of the negative pass before those of the positive.
_NEGATIVE_FIRST = {
    "StableDiffusion3Pipeline", "SanaPipeline", "StableDiffusionXLPipeline", "StableDiffusionPipeline", "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
}  # fmt: skip
_ENCODED = {
    "ChromaPipeline": (EMBEDS, "text_ids", MASKS[0], f"negative_{EMBEDS}", "negative_text_ids", f"negative_{MASKS[0]}"),
}


@dataclass(frozen=True)
class Contract:
    """The keyword arguments of a pipeline's ``__call__``, and the outputs of its ``encode_prompt``.

    Args:
        embeddings: Name of the argument for embeddings; None if the pipeline takes only prompts.
        pooled: Name of the argument for one pooled vector per caption, or None.
        mask: Name of the argument for the mask of the embeddings, or None.
        masking: How padding is hidden from the denoiser. "keyword": by the argument ``mask``. "joint": by
            `MaskedJointAttention`. "per_pass": by a mask of text and image tokens that differs between the positive and the
            negative pass. "cross": by a mask for the U-Net's cross-attention. "none": there is no mask, so only rows of
            equal length share a call.
        guidance: Name of the argument for the classifier-free guidance scale, or None.
        distilled: Name of the argument for the guidance scale that a distilled network takes as an input, or None.
        negatives: Names of the arguments for negative prompts.
        negative_first: Whether one call of the denoiser is known to have all negative rows, and then all positive ones.
        own_negative: Whether guidance on prompts uses a default negative prompt if none is given.
        encoded: Names of the outputs of ``encode_prompt`` that are used, in order.
        read_together: Whether several prompts may share a call.
        fixed: Arguments that are passed in every call.
    """

    embeddings: str | None
    pooled: str | None
    mask: str | None
    masking: Masking
    guidance: str | None
    distilled: str | None
    negatives: tuple[str, ...]
    negative_first: bool
    own_negative: bool
    encoded: tuple[str, ...]
    read_together: bool
    fixed: dict[str, Any]

    @property
    def takes_embeddings(self) -> bool:
        """Whether the pipeline can draw from an `EmbeddingCondition`."""
        return self.embeddings is not None


def contract_of(pipe: Any) -> Contract:
    """The contract of a pipeline, read from its class and, for masks, from its denoiser."""
    kind = type(pipe)
    call = inspect.signature(kind.__call__).parameters
    embeddings = EMBEDS if hasattr(kind, "encode_prompt") and _complete(call) else None
    mask = next((name for name in MASKS if name in call), None)
    negatives = tuple(name for name in call if name.startswith("negative_prompt"))
    guidance, distilled = _guidances(call, bool(negatives))
    return Contract(
        embeddings=embeddings,
        pooled=POOLED if POOLED in call else None,
        mask=mask,
        masking=_masking(pipe, mask),
        guidance=guidance,
        distilled=distilled,
        negatives=negatives,
        negative_first=kind.__name__ in _NEGATIVE_FIRST,
        own_negative=guidance == "guidance_scale",
        encoded=_encoded(kind) if embeddings else (),
        read_together=kind.__name__ in _READ_TOGETHER,
        fixed={"use_resolution_binning": False} if "use_resolution_binning" in call else {},
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
    as_list = EMBEDS in call and "list" in str(call[EMBEDS].annotation).lower()
    return EMBEDS in call and set(about) <= known and not as_list and "prior_token_ids" not in call


def _guidances(call: Any, negatives: bool) -> tuple[str | None, str | None]:
    """Names of the arguments for classifier-free and for distilled guidance. ``guidance_scale`` can be either of them."""
    scale = "guidance_scale" if "guidance_scale" in call else None
    if "true_cfg_scale" in call:
        return "true_cfg_scale", scale
    if "distilled_guidance_scale" in call:
        return None, "distilled_guidance_scale"
    return (scale, None) if negatives or EMBEDS not in call else (None, scale)


def _masking(pipe: Any, mask: str | None) -> Masking:
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
    if kind.__name__ in _ENCODED:
        return _ENCODED[kind.__name__]
    takes = inspect.signature(kind.encode_prompt).parameters
    mask = next((name for name in MASKS if name in takes), None)
    if "do_classifier_free_guidance" not in takes:
        return (EMBEDS, *((POOLED,) if POOLED in takes else ()), *((mask,) if mask else ()))
    if POOLED in takes:
        return EMBEDS, f"negative_{EMBEDS}", POOLED, f"negative_{POOLED}"
    if mask:
        return EMBEDS, mask, f"negative_{EMBEDS}", f"negative_{mask}"
    return EMBEDS, f"negative_{EMBEDS}"
