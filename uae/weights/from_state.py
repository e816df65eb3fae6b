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
    """Rename entries from the names of any version of transformers to those of the model in memory.

    The table of renamings is that of transformers itself. Values are not changed and may be of any type.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    return {rename_source_key(name, renamings, [])[0]: value for name, value in state.items()}


def diffusion_model(
    kind: Any, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype, source: str, key: str
) -> Any:
    """A diffusers model with the given weights, in eval mode.

    Args:
        kind: Class of the model in diffusers.
        config: Content of the model's ``config.json``.
        state: Weights by name; they must be complete.
        dtype: Dtype of the model.
        source: The checkpoint as an error message names it.
        key: The setting that an error message tells the user to correct.

    Raises:
        ValueError: The weights do not fit the configuration.
    """
    with _without_memory():
        model = kind.from_config(dict(config))
    torch.nn.Module.to(model, dtype)  # the method of diffusers would warn although no module is kept in float32
    load_into(model, state, source, key)
    return model.eval()


def qwen_model(folder: Path, dtype: torch.dtype, attention: str | None = None) -> Any:
    """A Qwen2.5-VL with the configuration in a folder. Its parameters are on the meta device."""
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    # from_pretrained cannot be used: under UniWorld-V1's model_type it would load the configuration of the image tower,
    # whose model_type is "qwen2_5_vl", as that of the whole model.
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
    """Inside, new parameters are created on the meta device. Buffers are computed, because checkpoints may lack them."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)
