"""Official checkpoints whose weights have names of their own: split into parts and loaded into the libraries' models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uae.weights.from_state import diffusion_model, qwen_model, qwen_names
from uae.weights.low_rank import Factors, merge_adapter, split_adapter
from uae.weights.state import load_into, read_state

State = dict[str, Tensor]
KEY = "model.init_args.system.init_args.checkpoint"
WRAPPER = "base_model.model."  # prefix that PEFT adds to the names of the model it wraps


def below(state: Mapping[str, Tensor], prefix: str) -> State:
    """The entries of a state dict whose names start with a prefix; the prefix is removed."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


# UAE -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UAEParts:
    """The parts of a state dict of UAE's language model."""

    language_model: State  # names of any version of transformers, see `qwen_names`
    factors: Factors  # the LoRA factors by the same names; empty if there is no adapter
    projector: State  # 0.weight, 0.bias, 2.weight, 2.bias


def uae_parts(state: Mapping[str, Tensor]) -> UAEParts:
    """Split a state dict of the official training, in which PEFT wraps the inner ``model`` or all of the language model.

    Raises:
        ValueError: The adapter is incomplete or no plain LoRA, see `uae.weights.low_rank.split_adapter`.
    """
    weights, factors = split_adapter({name.replace(WRAPPER, ""): value for name, value in state.items()})
    projector = below(weights, "projector.")
    return UAEParts({k: v for k, v in weights.items() if not k.startswith("projector.")}, factors, projector)


def uae_language_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    alpha: float = 64,
    attention: str | None = None,
) -> tuple[Any, State]:
    """UAE's language model in its class of transformers with the adapter merged, and the weights of its projector.

    Weights in ``llm_lora``, if the folder exists, replace those in ``llm``, as in the official code.

    Args:
        folder: Folder with the subfolder ``llm`` (which has the ``config.json``) and optionally ``llm_lora``.
        dtype: Dtype of the model; None is the checkpoint's.
        alpha: Numerator of the adapter's scale ``alpha / rank``; officially 64 (rank 32).
        attention: Name of the attention implementation in transformers; None is the library's choice.

    Returns:
        A ``Qwen2_5_VLForConditionalGeneration`` and the projector's state (empty if the checkpoint has none).

    Raises:
        FileNotFoundError, ValueError: The weights are missing or do not fit, see `read_state` and `load_into`.
    """
    folder = Path(folder)
    source = str(folder / "llm")
    parts = uae_parts(read_state(folder / "llm"))
    trained = (folder / "llm_lora").is_dir()
    model = qwen_model(folder / "llm", dtype or _dtype_of(parts.language_model), attention)
    weights, factors, projector = qwen_names(model, parts.language_model), parts.factors, parts.projector
    if trained:
        over = uae_parts(read_state(folder / "llm_lora"))
        source = f"{source} under {str(folder / 'llm_lora')}"
        weights |= qwen_names(model, over.language_model)
        factors, projector = over.factors, projector | over.projector
    as_weights = {f"{layer}.weight": pair for layer, pair in factors.items()}  # the library renames weights only
    factors = {name.removesuffix(".weight"): pair for name, pair in qwen_names(model, as_weights).items()}
    load_into(model, merge_adapter(weights, factors, lambda _, rank: alpha / rank), source, KEY)
    # PEFT records this name as the base of new adapters. The merged weights are in no folder that transformers reads.
    model.name_or_path = str(folder if factors else folder / "llm")
    return model, projector


def uae_transformer(folder: str | Path, dtype: torch.dtype) -> Any:
    """UAE's Stable Diffusion 3 transformer: ``dit`` in the layout of diffusers, the adapter ``dit_lora`` (if any) merged.

    Raises:
        FileNotFoundError, ValueError: The weights are missing or do not fit, see `read_state` and `load_into`.
    """
    import peft
    from diffusers import SD3Transformer2DModel

    folder = Path(folder)
    config = SD3Transformer2DModel.load_config(folder / "dit", local_files_only=True)
    transformer = diffusion_model(SD3Transformer2DModel, config, read_state(folder / "dit"), dtype, str(folder / "dit"), KEY)
    if not (folder / "dit_lora").is_dir():
        return transformer
    state = read_state(folder / "dit_lora")
    wrapped = peft.PeftModel.from_pretrained(transformer, folder / "dit_lora")
    _check_adapter(wrapped, state, str(folder / "dit_lora"))
    return wrapped.merge_and_unload()


# UniWorld-V1 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UniWorldParts:
    """The parts of a state dict of UniWorld-V1."""

    language_model: State
    projectors: dict[str, State]  # denoise_projector, siglip_projector, vae_projector: 0.* and 2.*
    transformer: State  # FLUX in diffusers' names


def uniworld_parts(state: Mapping[str, Tensor]) -> UniWorldParts:
    """Split a state dict of UniWorld-V1: ``denoise_tower.{denoiser,<name>_projector}.*`` and Qwen2.5-VL's own names."""
    tower = below(state, "denoise_tower.")
    names = sorted({name.partition(".")[0] for name in tower} - {"denoiser"})
    language_model = {name: value for name, value in state.items() if not name.startswith("denoise_tower.")}
    return UniWorldParts(language_model, {n: below(tower, f"{n}.") for n in names}, below(tower, "denoiser."))


def uniworld_language_model(
    folder: str | Path, dtype: torch.dtype | None = None, attention: str | None = None
) -> tuple[Any, dict[str, State]]:
    """UniWorld-V1's ``Qwen2_5_VLForConditionalGeneration`` and the states of its projectors by name.

    Raises:
        FileNotFoundError, ValueError: The weights are missing or do not fit, see `read_state` and `load_into`.
    """
    folder = Path(folder)
    parts = uniworld_parts(read_state(folder))
    if "denoise_projector" not in parts.projectors:
        raise ValueError(f"{str(folder)!r} has no denoise_tower.denoise_projector.*: no UniWorld-V1; correct {KEY}")
    model = qwen_model(folder, dtype or _dtype_of(parts.language_model), attention)
    load_into(model, qwen_names(model, parts.language_model), str(folder), KEY)
    return model, parts.projectors


def uniworld_transformer(folder: str | Path, dtype: torch.dtype, flux: str | Path | None = None) -> Any:
    """UniWorld-V1's FLUX transformer.

    Args:
        folder: The checkpoint; its ``config.json`` holds FLUX's configuration under ``denoise_tower.denoiser_config``.
        dtype: Dtype of the model.
        flux: Folder of FLUX.1-dev, whose configuration is used if the checkpoint's has only the path of a file.

    Raises:
        FileNotFoundError, ValueError: The weights or FLUX's configuration are missing, or the weights do not fit.
    """
    import json

    from diffusers import FluxTransformer2DModel

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text()).get("denoise_tower", {}).get("denoiser_config")
    if not isinstance(config, dict):
        if flux is None:
            raise ValueError(
                f"{str(folder / 'config.json')!r} has no denoise_tower.denoiser_config; set model.init_args.system.init_args.flux"
            )
        config = FluxTransformer2DModel.load_config(Path(flux, "transformer"), local_files_only=True)
    state = uniworld_parts(read_state(folder)).transformer
    return diffusion_model(FluxTransformer2DModel, config, state, dtype, f"{folder}: denoise_tower.denoiser", KEY)


# OpenUni -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenUniParts:
    """The parts of a state dict of OpenUni. Parts that were frozen in its training may be empty."""

    meta_queries: Tensor  # [Q, D]
    connector: State
    projector: State
    transformer: State = field(default_factory=dict)  # Sana in diffusers' names
    language_model: State = field(default_factory=dict)  # of the original InternVL or Qwen code
    found: str = ""  # the parts that exist and their numbers of tensors, e.g. "connector (96), meta_queries (1)"


def openuni_parts(state: Mapping[str, Tensor], alpha: float = 8) -> OpenUniParts:
    """Split the state dict of an OpenUni ``.pth``. An adapter on the transformer (scale ``alpha / rank``) is merged.

    Raises:
        ValueError: Queries, connector or projector are missing, or there are tensors of unknown parts.
    """
    known = {"meta_queries", "connector", "projector", "transformer", "lmm", "vae", "vit_mean", "vit_std"}
    counts: dict[str, int] = {}
    for name in state:
        counts[name.partition(".")[0]] = counts.get(name.partition(".")[0], 0) + 1
    found = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) or "nothing"
    wrong = sorted({"meta_queries", "connector", "projector"} - counts.keys()) or sorted(counts.keys() - known)
    if wrong:
        fault = "unknown" if wrong[0] in counts else "missing"
        raise ValueError(f"no OpenUni checkpoint: {fault} {', '.join(wrong)}; found {found}; correct {KEY}")
    weights, factors = split_adapter(below(state, "transformer."))
    return OpenUniParts(
        meta_queries=state["meta_queries"],
        connector=below(state, "connector."),
        projector=below(state, "projector."),
        transformer=merge_adapter(weights, factors, lambda _, rank: alpha / rank),
        language_model=below(state, "lmm."),
        found=found,
    )


# Shared ----------------------------------------------------------------------------------------------------------------


def _dtype_of(state: State) -> torch.dtype:
    return next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)


def _check_adapter(wrapped: Any, state: State, source: str) -> None:
    """Raise if an adapter file is incomplete: PEFT would silently leave the missing factors at their initial values."""
    from peft import get_peft_model_state_dict

    expected, found = set(get_peft_model_state_dict(wrapped)), set(state)
    if expected != found:
        name = min(expected ^ found)
        what = "lacks" if name in expected else "has an unexpected"
        raise ValueError(f"{source} {what} {name} (and {len(expected ^ found) - 1} more); correct {KEY}")
