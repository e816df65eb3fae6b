"""Models of transformers and diffusers from a configuration and a state dict, without a second copy in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from uae.weights.state import load_into

T = TypeVar("T")


def qwen_names(model: Any, state: Mapping[str, T]) -> dict[str, T]:
    """Names as the model has them in memory, from those of any version of transformers, by its own table of renamings."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    return {rename_source_key(name, renamings, [])[0]: value for name, value in state.items()}


def diffusion_model(
    kind: Any, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype, source: str, key: str
) -> Any:
    """A diffusers model of a class and configuration with exactly this state."""
    with _without_memory():
        model = kind.from_config(dict(config))
    torch.nn.Module.to(model, dtype)  # diffusers' own warns of modules to keep in float32, though it names none
    load_into(model, state, source, key)
    return model.eval()


def qwen_model(folder: Path, dtype: torch.dtype, attention: str | None = None) -> Any:
    """A Qwen2.5-VL of a folder's configuration, parameters on the meta device."""
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    # Not by from_pretrained: under UniWorld-V1's own model_type it would take the image tower, named "qwen2_5_vl", for all.
    written = json.loads((folder / "config.json").read_text())
    config = Qwen2_5_VLConfig(**{k: v for k, v in written.items() if k not in ("model_type", "denoise_tower")})
    with _without_memory():
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.name_or_path = str(folder)
    return model.eval()


def _without_memory() -> AbstractContextManager[Any]:
    """Inside, new parameters are on the meta device; buffers that no checkpoint holds are computed as ever."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)
