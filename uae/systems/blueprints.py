"""Models without weights: architectures on the meta device, for plans that must not download or read gigabytes.

Sizes come from a checkpoint folder's own ``config.json`` files where the folder is here, else from ``published/``, which
keeps those of the public models that the shipped configurations name, else from the hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uae.files.locations import locate
from uae.weights.placement import Placement

if TYPE_CHECKING:
    from uae.models.captioners.loading import Reading
    from uae.models.renderers.diffusers import Rendering
    from uae.models.tokens.policy import TokenSampling

PUBLISHED = Path(__file__).parent / "published"


@dataclass(frozen=True)
class TokenDrawing:
    """How the policy itself draws, token by token; for `uae.memory.image_tokens`.

    Args:
        tokens: S, image tokens that are drawn.
        written: Tokens that are fed for them, with whatever is written between.
        codes: V, size of the image vocabulary.
        pixels: Of an image.
        sampling: Its guidance doubles the rows of a pass.
        rows: Images drawn together.
    """

    tokens: int
    written: int
    codes: int
    pixels: int
    sampling: TokenSampling
    rows: int


@dataclass(frozen=True)
class Blueprint:
    """A system without its weights; what ``System.blueprint()`` returns and `uae.memory.plan` reads.

    Args:
        policy: The captioner's network as it would be loaded (before any adapter), on the meta device.
        frozen: Name to network and placement. Parts that draw are called as in a diffusers pipeline (`DRAWS`); all
            others work while captions are encoded.
        rendering: How images are drawn; None where nothing on this machine draws.
        prompt_tokens: Tokens of the longest prompt, its image included. The plan takes more where the data's images
            alone need more.
        condition_tokens: L, tokens per row that the renderer attends to.
        reading: How the captioner is loaded; None is `Reading`'s defaults.
        policy_reads: The policy's language model encodes the captions, instead of frozen text encoders or besides them.
        needs_reference: The reference's weights are kept whatever the loss, see `uae.types.UMM`.
        drawing: Of policies that draw token by token.
    """

    policy: nn.Module
    frozen: dict[str, tuple[nn.Module, Placement]] = field(default_factory=dict)
    rendering: Rendering | None = None
    prompt_tokens: int = 400
    condition_tokens: int = 512
    reading: Reading | None = None
    policy_reads: bool = False
    needs_reference: bool = False
    drawing: TokenDrawing | None = None


_RENAMED = {"univa_qwen2p5vl": "qwen2_5_vl"}  # UniWorld-V1's own subclass: the same network with a projector beside it
DRAWS = ("transformer", "unet", "vae")  # names of diffusers; "unet" is the denoiser of older pipelines


def published(name: str) -> dict[str, Any] | None:
    """The kept files of a hub id, file name (``config.json``, ``vae/config.json``, ...) to content; None if not kept."""
    file = PUBLISHED / f"{name.replace('/', '--')}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def config_of(name: str, subfolder: str | None = None, file: str = "config.json") -> dict[str, Any]:
    """The content of a checkpoint's ``config.json``.

    Args:
        name: A folder or a hub id, see `uae.files.locations.locate`.
        subfolder: Part of a pipeline, e.g. "transformer".
        file: Another file of the same place, e.g. "model_index.json".

    Raises:
        FileNotFoundError: It is not in the folder, not kept here, and cannot be had from the hub.
    """
    path = f"{subfolder}/{file}" if subfolder else file
    place = locate(name)
    if Path(place).is_dir():
        local = Path(place, path)
        if not local.is_file():
            raise FileNotFoundError(f"no {path} in {place!r}; give a complete checkpoint folder or a hub id")
        return json.loads(local.read_text())
    kept = (published(name) or {}).get(path)
    return kept if kept is not None else _from_hub(name, path)


def _from_hub(name: str, path: str) -> dict[str, Any]:
    import huggingface_hub

    try:
        return json.loads(Path(huggingface_hub.hf_hub_download(name, path)).read_text())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{path} of {name!r} is not kept with the package and cannot be had from the hub ({reason}); give a folder "
            "that has it"
        ) from error


def vlm_skeleton(name: str, dtype: str = "bfloat16") -> Any:
    """A vision-language model, in the given dtype."""
    import transformers

    with torch.device("meta"):
        config = _transformers_config(config_of(name), name)
        return transformers.AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=False
        )


def denoiser_skeleton(name: str, subfolder: str | None = "transformer", dtype: str = "bfloat16") -> Any:
    """A diffusion transformer (or U-Net); ``subfolder=None`` for a folder that holds nothing else."""
    return _diffusers_skeleton(config_of(name, subfolder), name, dtype)


def vae_skeleton(name: str, subfolder: str | None = "vae", dtype: str = "bfloat16") -> nn.Module:
    """The autoencoder of a pipeline."""
    return _diffusers_skeleton(config_of(name, subfolder), name, dtype)


def pipeline_skeletons(name: str, leave_out: Iterable[str] = (), dtype: str = "bfloat16") -> dict[str, Any]:
    """The networks of a diffusers pipeline by the names of its ``model_index.json``.

    Args:
        name: A folder or a hub id.
        leave_out: Parts that a system brings itself or does without, e.g. "text_encoder_3".
        dtype: Of all parts.
    """
    parts: dict[str, Any] = {}
    for part, (library, kind) in _networks(config_of(name, file="model_index.json")).items():
        if part in leave_out:
            continue
        config = config_of(name, part)
        if library == "transformers":
            parts[part] = _transformers_skeleton(config, name, kind, dtype)
        else:
            parts[part] = _diffusers_skeleton(config, name, dtype)
    return parts


def encoder_skeleton(name: str, dtype: str = "float32") -> Any:
    """An image tower as `uae.encoders.HFEncoder` loads it: float32, without the text side."""
    config = config_of(name)
    projected = config.get("model_type") == "clip_vision_model"
    module = _transformers_skeleton(config, name, "CLIPVisionModelWithProjection" if projected else "AutoModel", dtype)
    for part in ("text_model", "text_projection"):
        if hasattr(module, part):
            setattr(module, part, None)
    return module


def open_clip_skeleton(name: str) -> nn.Module:
    """An image tower as `uae.encoders.OpenCLIPEncoder` loads it: float32."""
    import open_clip

    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    else:
        config = open_clip.get_model_config(name.removeprefix("hf-hub:"))
    if config is None:
        raise ValueError(f"open_clip knows no architecture {name!r}; set the encoder's init_args.name")
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    known = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    with torch.device("meta"):
        return kind(**{key: value for key, value in config.items() if key in known}).visual


def _networks(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Part name to library and class, for the parts of a pipeline that have weights."""
    pairs = {name: pair for name, pair in index.items() if isinstance(pair, list) and len(pair) == 2 and pair[1]}
    weightless = ("tokenizer", "scheduler", "feature_extractor", "processor", "image_processor", "safety_checker")
    return {name: tuple(pair) for name, pair in pairs.items() if not name.startswith(weightless)}


def _transformers_config(config: dict[str, Any], name: str) -> Any:
    import transformers

    config = dict(config)
    kind = config.pop("model_type", None)
    kind = _RENAMED.get(kind, kind)
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"config.json of {name!r} has model_type {kind!r}, which this transformers does not know")
    return transformers.CONFIG_MAPPING[kind].from_dict(config)


def _transformers_skeleton(config: dict[str, Any], name: str, kind: str, dtype: str) -> Any:
    import transformers

    built = _transformers_config(config, name)
    with torch.device("meta"):
        if kind == "AutoModel":
            return transformers.AutoModel.from_config(built, dtype=getattr(torch, dtype), trust_remote_code=False)
        return getattr(transformers, kind)._from_config(built, dtype=getattr(torch, dtype))


def _diffusers_skeleton(config: dict[str, Any], name: str, dtype: str) -> Any:
    import diffusers

    kind = getattr(diffusers, config.get("_class_name", ""), None)
    if kind is None:
        raise ValueError(f"a config.json of {name!r} names the class {config.get('_class_name')!r}, unknown to diffusers")
    with torch.device("meta"):
        return nn.Module.to(kind.from_config(config), getattr(torch, dtype))  # diffusers' own warns on every call
