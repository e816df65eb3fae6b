"""Networks without weights, on the meta device. A memory plan needs their sizes and must not download or read gigabytes.

The configuration of a network is read from the checkpoint folder if it exists on this machine, else from the folder
``published/`` beside this file (for the public models that the shipped configurations name), else from the hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uae.files.locations import locate
from uae.models.pipelines.loading import components_of
from uae.models.pipelines.quirks import QUIRKS, Quirks
from uae.weights.placement import Placement

if TYPE_CHECKING:
    from uae.models.captioners.loading import Reading
    from uae.models.captioners.policy import CaptionPolicy
    from uae.models.renderers.diffusers import Rendering
    from uae.models.tokens.policy import TokenSampling

PUBLISHED = Path(__file__).parent / "published"


@dataclass(frozen=True)
class TokenDrawing:
    """Sizes of a policy that draws images itself, token by token. Read by `uae.memory.drawing`.

    Args:
        tokens: S, number of image tokens that are sampled per image.
        written: Number of tokens that the model reads while it draws one image, separators between rows included.
        codes: Number of entries of the image vocabulary.
        pixels: Number of pixels of one image, height times width.
        sampling: Settings of the sampler; classifier-free guidance doubles the rows of a forward pass.
        rows: Number of images drawn in one batch.
    """

    tokens: int
    written: int
    codes: int
    pixels: int
    sampling: TokenSampling
    rows: int


@dataclass(frozen=True)
class StepDrawing:
    """Sizes of a policy that draws images itself, by denoising. Read by `uae.memory.drawing`.

    Args:
        written: Number of tokens that the model reads of an image in a step, marks around it included.
        latents: Number of values of the latents of one image.
        size: Height and width of the images in pixels.
        steps: Number of denoising steps.
        guided: Number of those in which guidance takes a second pass, without the caption.
        rows: Number of images in one pass.
        placement: Device and dtype of the autoencoder.
    """

    written: int
    latents: int
    size: tuple[int, int]
    steps: int
    guided: int
    rows: int
    placement: Placement


@dataclass(frozen=True)
class Blueprint:
    """A system without its weights. ``System.blueprint()`` returns it and `uae.memory.plan` reads it.

    Args:
        policy: The captioner's network on the meta device, as it is loaded before any adapter is added.
        frozen: Name to network and placement of every frozen part. The names in `DRAWS` are the parts that draw images;
            all other parts are used while captions are encoded.
        rendering: Settings of the renderer; None if no images are drawn on this machine.
        prompt_tokens: Number of tokens of the longest prompt, its image included. The plan uses a larger number if the
            images of the data need more.
        condition_tokens: L, number of tokens per caption that the renderer attends to.
        reading: Settings with which the captioner is loaded; None stands for the defaults of `Reading`.
        policy_reads: True if the policy's language model encodes the captions, alone or beside frozen text encoders.
        needs_reference: True if the weights at the start of the run are kept whatever the loss is, see `uae.types.UMM`.
        drawing: Sizes of a policy that draws images itself; None for all others.
        network: Function from ``policy``, and whether activations are recomputed, to the network that learns. None is a
            `CaptionPolicy`.
    """

    policy: nn.Module
    frozen: dict[str, tuple[nn.Module, Placement]] = field(default_factory=dict)
    rendering: Rendering | None = None
    prompt_tokens: int = 400
    condition_tokens: int = 512
    reading: Reading | None = None
    policy_reads: bool = False
    needs_reference: bool = False
    drawing: TokenDrawing | StepDrawing | None = None
    network: Callable[[nn.Module, bool], CaptionPolicy] | None = None


_RENAMED = {"univa_qwen2p5vl": "qwen2_5_vl"}  # UniWorld-V1's class is Qwen2.5-VL with a projector added
DRAWS = ("transformer", "unet", "vae")  # components of diffusers pipelines; "unet" is the denoiser of older ones


def published(name: str) -> dict[str, Any] | None:
    """The configuration files of a hub id that ship with this package.

    Returns:
        File name (``config.json``, ``vae/config.json``, ...) to content; None if this hub id is not among them.
    """
    file = PUBLISHED / f"{name.replace('/', '--')}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def config_of(name: str, subfolder: str | None = None, file: str = "config.json") -> dict[str, Any]:
    """The content of a checkpoint's ``config.json``.

    Args:
        name: A folder or a hub id, see `uae.files.locations.locate`.
        subfolder: Component of a pipeline, e.g. "transformer"; None reads the file at the top.
        file: Name of another JSON file to read instead, e.g. "model_index.json".

    Raises:
        FileNotFoundError: The folder lacks the file; or the file ships neither with this package nor can it be downloaded.
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
            f"{path} of {name!r} does not ship with this package and cannot be downloaded from the hub ({reason}); "
            "give a folder that has it"
        ) from error


def vlm_skeleton(name: str, dtype: str = "bfloat16", subfolder: str | None = None) -> Any:
    """A vision-language model of transformers in the given dtype. Its class follows from the checkpoint's configuration."""
    import transformers

    with torch.device("meta"):
        config = _transformers_config(config_of(name, subfolder), name)
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)


def denoiser_skeleton(name: str, subfolder: str | None = "transformer", dtype: str = "bfloat16") -> Any:
    """A diffusion transformer or U-Net. ``subfolder=None`` reads a folder that holds this network alone."""
    return _diffusers_skeleton(config_of(name, subfolder), name, dtype)


def vae_skeleton(name: str, subfolder: str | None = "vae", dtype: str = "bfloat16") -> nn.Module:
    """The autoencoder of a diffusers pipeline."""
    return _diffusers_skeleton(config_of(name, subfolder), name, dtype)


def pipeline_skeletons(name: str, leave_out: Iterable[str] = (), dtype: str = "bfloat16") -> dict[str, Any]:
    """The networks of a diffusers pipeline by the names of its ``model_index.json``.

    Args:
        name: A folder or a hub id.
        leave_out: Names of components to skip, e.g. "text_encoder_3".
        dtype: Dtype of all networks.
    """
    index = config_of(name, file="model_index.json")
    aside = {*leave_out, *QUIRKS.get(index.get("_class_name", ""), Quirks()).left_out}
    parts: dict[str, Any] = {}
    for part, pair in components_of(index).items():
        kind = None if part in aside else _network(*pair)
        if kind is not None:
            config = config_of(name, part)
            own = hasattr(kind, "config_class")
            parts[part] = _own_skeleton(kind, config, dtype) if own else _diffusers_skeleton(config, name, dtype)
    return parts


def encoder_skeleton(name: str, dtype: str = "float32") -> Any:
    """An image encoder as `uae.encoders.HFEncoder` loads it: float32, without its text encoder."""
    config = config_of(name)
    projected = config.get("model_type") == "clip_vision_model"
    module = _transformers_skeleton(config, name, "CLIPVisionModelWithProjection" if projected else "AutoModel", dtype)
    for part in ("text_model", "text_projection"):
        if hasattr(module, part):
            setattr(module, part, None)
    return module


def open_clip_skeleton(name: str) -> nn.Module:
    """An image encoder as `uae.encoders.OpenCLIPEncoder` loads it: float32."""
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


def _network(library: str | None, kind: str | None) -> Any:
    """The class of a component of a pipeline, or None if it is no network: a tokenizer, a scheduler, a guider, or nothing."""
    import diffusers
    import transformers

    if library is None or kind is None:
        return None
    own = {"diffusers": diffusers, "transformers": transformers}.get(library) or getattr(diffusers.pipelines, library, None)
    found = getattr(own, kind, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


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

    if kind != "AutoModel":
        return _own_skeleton(getattr(transformers, kind), config, dtype)
    built = _transformers_config(config, name)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(built, dtype=getattr(torch, dtype), trust_remote_code=False)


def _own_skeleton(kind: Any, config: dict[str, Any], dtype: str) -> Any:
    """A network whose class has a configuration in the manner of transformers, also where a pipeline of diffusers defines it."""
    with torch.device("meta"):
        return kind._from_config(kind.config_class.from_dict(dict(config)), dtype=getattr(torch, dtype))


def _diffusers_skeleton(config: dict[str, Any], name: str, dtype: str) -> Any:
    import diffusers

    kind = getattr(diffusers, config.get("_class_name", ""), None)
    if kind is None:
        raise ValueError(f"a config.json of {name!r} names the class {config.get('_class_name')!r}, unknown to diffusers")
    with torch.device("meta"):
        return nn.Module.to(kind.from_config(config), getattr(torch, dtype))  # the method of diffusers would warn on every call
