"""The parts of an OmniGen2 checkpoint in the official layout: mllm, processor, transformer, vae, scheduler. No code in it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from uae.weights.from_state import diffusion_model, qwen_model, qwen_names
from uae.weights.remote_code import refused
from uae.weights.state import load_into, read_state

KEY = "model.init_args.system.init_args.checkpoint"
PARTS = ("mllm", "processor", "transformer", "vae", "scheduler")


def check_folders(folder: Path) -> None:
    """Check that all parts are there.

    Raises:
        FileNotFoundError: A subfolder is missing.
    """
    missing = [name for name in PARTS if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"OmniGen2 checkpoint {str(folder)!r} lacks {', '.join(missing)}; {KEY} must be a folder with {', '.join(PARTS)}"
        )


def load_language_model(folder: Path, dtype: torch.dtype, attention: str | None = None) -> tuple[Any, Any]:
    """The ``Qwen2_5_VLForConditionalGeneration`` of a checkpoint, and its processor.

    Raises:
        FileNotFoundError, ValueError: The weights are missing or do not fit.
    """
    from transformers import AutoProcessor

    model = qwen_model(folder / "mllm", dtype, attention)
    load_into(model, qwen_names(model, read_state(folder / "mllm")), str(folder / "mllm"), KEY)
    with refused(str(folder)):
        processor = AutoProcessor.from_pretrained(folder / "processor", local_files_only=True, trust_remote_code=False)
    return model, processor


def load_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """The `uae.models.omnigen2.pipeline.OmniGen2Pipeline` of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError, ValueError: The weights are missing or do not fit.
    """
    from diffusers import AutoencoderKL

    from uae.models.omnigen2.pipeline import OmniGen2Pipeline
    from uae.models.omnigen2.transformer import OmniGen2Transformer2DModel

    parts: dict[str, Any] = {}
    for name, kind in (("transformer", OmniGen2Transformer2DModel), ("vae", AutoencoderKL)):
        config = _config(folder / name / "config.json")
        part = diffusion_model(kind, config, read_state(folder / name), dtype, str(folder / name), KEY)
        part.register_to_config(_name_or_path=str(folder / name))  # which an adapter names as its base
        parts[name] = part
    scheduler = scheduler_of(_config(folder / "scheduler" / "scheduler_config.json"))
    return OmniGen2Pipeline(parts["transformer"], parts["vae"], scheduler)


def scheduler_of(config: dict[str, Any]) -> Any:
    """The scheduler of diffusers that has the times of the official one, whose class has the same name and is another.

    Args:
        config: The official ``scheduler_config.json``: ``num_train_timesteps``, and ``dynamic_time_shift`` for times that depend on
            the size of the image.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        use_dynamic_shifting=config.get("dynamic_time_shift", True),
        time_shift_type="linear",
        invert_sigmas=True,
    )


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {str(file.parent)!r}; complete the folder or change {KEY}")
    config: dict[str, Any] = json.loads(file.read_text())
    return config
