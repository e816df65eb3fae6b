"""Every tiny pipeline that can be built, how its own documentation calls it, and what happened before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.breadth.checkpoints import flow_matching, glm, kolors, others
from uae.rehearsal.pipelines import PIPELINES, write


def _by_signature(guidance: float) -> dict[str, Any]:
    return {"guidance_scale": guidance}


def _real(guidance: float) -> dict[str, Any]:
    return {"true_cfg_scale": guidance, "negative_prompt": ""}


def _from_zero(guidance: float) -> dict[str, Any]:
    return {"guidance_scale": guidance - 1}


def _none(guidance: float) -> dict[str, Any]:
    return {}


def _nothing(pipe: Any, guidance: float) -> None:
    return


@dataclass(frozen=True)
class Entry:
    """One pipeline.

    Args:
        write: Writes its checkpoint into a folder.
        before: What happened before, in a word or two.
        guidance: The pipeline's own arguments for a guidance scale of which 1 is none.
        own: Its other arguments, which a caller of the library gives.
        prepare: What a caller of the library does to the pipeline first, given the guidance scale.
        steps: Number of denoising steps.
        tokens: Most tokens of a caption that are read; None is the pipeline's default.
    """

    write: Callable[[Path], None]
    before: str
    guidance: Callable[[float], dict[str, Any]] = _by_signature
    own: tuple[tuple[str, Any], ...] = ()
    prepare: Callable[[Any, float], None] = _nothing
    steps: int = 4
    tokens: int | None = None


def _small(pipe: Any, guidance: float) -> None:
    pipe.default_sample_size = 4


def _resolutions(pipe: Any, guidance: float) -> None:
    pipe.resolutions = [(32, 32)]


def _without_guiders(pipe: Any, guidance: float) -> None:
    if guidance == 1:
        pipe.guider = pipe.ocr_guider = None


def _unchecked(pipe: Any, guidance: float) -> None:
    pipe.safety_checker = None


def _made(create: Callable[[], Any]) -> Callable[[Path], None]:
    return partial(write, create=create)


_EXACT = (("use_resolution_binning", False),)

CATALOG: dict[str, Entry] = {
    "QwenImage": Entry(PIPELINES["qwen_image"], "works", _real),
    "Lumina2": Entry(_made(others.lumina2), "works"),
    "OvisImage": Entry(_made(flow_matching.ovis_image), "works"),
    "AuraFlow": Entry(_made(others.aura_flow), "crash with guidance"),
    "PixArtSigma": Entry(_made(others.pixart_sigma), "renders", own=_EXACT),
    "Kolors": Entry(_made(kolors.kolors), "renders"),
    "HunyuanDiT": Entry(_made(others.hunyuan_dit), "renders", own=_EXACT),
    "SanaSprint": Entry(_made(others.sana_sprint), "renders", _none, _EXACT, steps=2),
    "BriaFibo": Entry(_made(others.bria_fibo), "works as text"),
    "ErnieImage": Entry(_made(flow_matching.ernie_image), "silently wrong: rewrites captions", own=(("use_pe", False),)),
    "PRX": Entry(_made(others.prx), "crash with guidance", own=_EXACT),
    "Flux2": Entry(_made(flow_matching.flux2), "crash", _none),
    "Flux2Klein": Entry(_made(flow_matching.flux2_klein), "crash as a policy", tokens=128),
    "ZImage": Entry(_made(flow_matching.z_image), "silently wrong: guidance", _from_zero, tokens=128),
    "QwenImage21": Entry(_made(flow_matching.qwen_image_2_1), "crash", _real),
    "StableDiffusion": Entry(_made(others.stable_diffusion), "crash", prepare=_unchecked),
    "LongCatImage": Entry(_made(flow_matching.longcat_image), "crash", own=(("enable_prompt_rewrite", False),)),
    "Chroma": Entry(_made(others.chroma), "crash"),
    "Krea2": Entry(_made(flow_matching.krea2), "crash", _from_zero, tokens=128),
    "CogView4": Entry(_made(others.cogview4), "silently wrong: pixels depend on the batch"),
    "HunyuanImage": Entry(_made(flow_matching.hunyuan_image), "silently wrong: guidance", _none, prepare=_without_guiders),
    "HiDreamImage": Entry(_made(flow_matching.hidream_image), "silently wrong: size", prepare=_small),
    "Kandinsky5T2I": Entry(_made(flow_matching.kandinsky_5), "silently wrong: size", prepare=_resolutions),
    "GlmImage": Entry(_made(glm.glm_image), "silently wrong: ratio"),
    # beyond the 23 of the first measurement
    "Flux2Klein, distilled": Entry(_made(flow_matching.flux2_klein_distilled), "silently wrong: guidance"),
    "PRXPixel": Entry(_made(others.prx_pixel), "silently wrong: range", own=_EXACT),
    "LatentConsistencyModel": Entry(_made(others.latent_consistency), "crash", _none),
    "NucleusMoEImage": Entry(_made(flow_matching.nucleus_image), "crash"),
    "CogView3Plus": Entry(_made(others.cogview3_plus), "renders"),
    "Lumina": Entry(_made(others.lumina), "works"),
    "Bria": Entry(_made(others.bria), "works"),
    "StableDiffusion3": Entry(PIPELINES["sd3"], "works"),
    "Flux": Entry(PIPELINES["flux"], "works", _real),
    "Sana": Entry(PIPELINES["sana"], "works", own=_EXACT),
    "StableDiffusionXL": Entry(PIPELINES["sdxl"], "renders"),
    "OmniGen": Entry(PIPELINES["omnigen"], "works as text"),
}
