"""What a signature does not say about a pipeline class of diffusers: one row per class.

The table holds for diffusers 0.42. A class without a row gets one caption per call, guidance as its signature names it, and the
masks of its signature. To support another class, run ``python -m benchmarks.breadth.pipelines`` with a tiny checkpoint of it, and
write a row for what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Masking = Literal["keyword", "joint", "per_pass", "cross", "additive", "list", "none"]


@dataclass(frozen=True)
class Quirks:
    """Differences of a class from what its signatures suggest. The defaults are those of most classes.

    Args:
        read_together: Several captions may share a call, because no caption changes the embeddings or the pixels of another.
        negative_first: Under guidance the denoiser is called once per step, with all negative rows before all positive ones.
        one_batch: Under guidance, negative and positive embeddings are in one batch without a mask, so they must be equally long.
        text_only: The pipeline takes embeddings, but does not draw from them alone.
        reads_padding: The denoiser attends to the padding of the pipeline's own text encoders, whatever mask they return.
        masking: How padding is hidden, where the signature misleads; see `uae.models.pipelines.contracts.Contract`.
        mask_kind: Kind of numbers in the mask of the embeddings.
        encoded: Names of the outputs of ``encode_prompt``, where they are not in the usual order.
        guidance_from_zero: The pipeline computes ``positive + g (positive - negative)``, so that its g is one less than ours.
        guided_rows: Most rows of a call with guidance.
        size_factor: Height and width must be multiples of this many times the pixels per token.
        size_from: What makes the pipeline draw another size than asked for: the "area" of ``default_sample_size``, or its list
            of "resolutions".
        steps: The only number of denoising steps that the pipeline can do.
        signed: Pixels are returned in [-1, 1].
        reseeds: The pipeline seeds the global random generator of torch.
        fixed: Arguments that are passed in every call.
        left_out: Arguments of loading that leave components out which would change the captions or the pixels.
        packages: Packages that its components import.
        no_policy: Why denoising steps of this class have no log-probs; None if they have.
    """

    read_together: bool = False
    negative_first: bool = False
    one_batch: bool = False
    text_only: bool = False
    reads_padding: bool = False
    masking: Masking | None = None
    mask_kind: Literal["integer", "float", "bool"] = "integer"
    encoded: tuple[str, ...] | None = None
    guidance_from_zero: bool = False
    guided_rows: int | None = None
    size_factor: int = 1
    size_from: Literal["area", "resolutions"] | None = None
    steps: int | None = None
    signed: bool = False
    reseeds: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    no_policy: str | None = None


_NO_SAFETY_CHECKER = {"safety_checker": None, "requires_safety_checker": False}  # it blackens images, and stops the gradient
_CHROMA = (
    "prompt_embeds", "text_ids", "prompt_attention_mask", "negative_prompt_embeds", "negative_text_ids",
    "negative_prompt_attention_mask",
)  # fmt: skip

QUIRKS: dict[str, Quirks] = {
    # one call of the denoiser per step, negatives first
    "StableDiffusion3Pipeline": Quirks(read_together=True, negative_first=True),
    "StableDiffusionPipeline": Quirks(read_together=True, negative_first=True, left_out=_NO_SAFETY_CHECKER),
    "StableDiffusionXLPipeline": Quirks(read_together=True, negative_first=True),
    "LatentConsistencyModelPipeline": Quirks(read_together=True, left_out=_NO_SAFETY_CHECKER),
    "PixArtAlphaPipeline": Quirks(read_together=True, negative_first=True),
    "PixArtSigmaPipeline": Quirks(read_together=True, negative_first=True),
    "SanaPipeline": Quirks(read_together=True, negative_first=True),
    "OmniGen2Pipeline": Quirks(read_together=True, negative_first=True),  # of this project
    "SanaSprintPipeline": Quirks(read_together=True, steps=2),
    # two calls per step, or guidance as an input
    "FluxPipeline": Quirks(read_together=True),
    "Flux2Pipeline": Quirks(),
    "QwenImagePipeline": Quirks(read_together=True),
    # the text and its masks
    "AuraFlowPipeline": Quirks(reads_padding=True, one_batch=True),
    "BriaPipeline": Quirks(one_batch=True),
    "ChromaPipeline": Quirks(masking="additive", mask_kind="float", encoded=_CHROMA),
    "Krea2Pipeline": Quirks(mask_kind="bool", guidance_from_zero=True),
    "QwenImage21Pipeline": Quirks(masking="none", size_factor=2, fixed={"use_kv_cache": False}),
    "LongCatImagePipeline": Quirks(text_only=True, fixed={"enable_prompt_rewrite": False}),
    "ErnieImagePipeline": Quirks(fixed={"use_pe": False}, left_out={"pe": None, "pe_tokenizer": None}),
    "KolorsPipeline": Quirks(packages=("sentencepiece",)),
    # guidance
    "ZImagePipeline": Quirks(guidance_from_zero=True),
    "PRXPipeline": Quirks(guided_rows=1),
    "PRXPixelPipeline": Quirks(guided_rows=1, signed=True),
    # size
    "HiDreamImagePipeline": Quirks(size_from="area"),
    "Kandinsky5T2IPipeline": Quirks(size_from="resolutions"),
    # steps that are no function of latents, caption and time
    "GlmImagePipeline": Quirks(
        size_factor=2, reseeds=True, no_policy="it draws tokens of the image anew in every call, and its steps depend on them"
    ),
}


def quirks_of(kind: type) -> Quirks:
    """The row of a pipeline class; its parents have no say."""
    return QUIRKS.get(kind.__name__, Quirks())
