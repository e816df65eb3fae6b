"""Rank and scale of adapters in checkpoints. The factors alone do not tell the scale, with which a policy is another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

ADAPTERS = "adapters"  # key of a checkpoint: rank and alpha of every adapter, by the name of the module that holds it
KEYS = {
    "policy.model": "model.init_args.finetune.init_args",
    "image_policy.model": "model.init_args.image_finetune.init_args",
    "objective.policy.model": "model.init_args.finetune.init_args",
    "objective.denoiser": "model.init_args.objective.init_args.decoder.init_args",
}


def adapters_of(module: nn.Module) -> dict[str, dict[str, int]]:
    """Rank and alpha of every adapter in a module, by the name of the PeftModel that holds it."""
    from peft import PeftModel

    models = {name: part for name, part in module.named_modules() if isinstance(part, PeftModel)}
    configs: dict[str, Any] = {name: model.peft_config["default"] for name, model in models.items()}
    return {name: {"rank": config.r, "alpha": config.lora_alpha} for name, config in configs.items()}


def check_adapters(module: nn.Module, checkpoint: Mapping[str, Any], path: str | Path | None = None) -> None:
    """Check that the adapters of a checkpoint have the rank and alpha of those of a module.

    Args:
        module: The module that the checkpoint is loaded into.
        checkpoint: Content of the checkpoint.
        path: Path of the checkpoint, for the error message.

    Raises:
        ValueError: A rank or an alpha differs.
    """
    here, written = adapters_of(module), checkpoint.get(ADAPTERS, {})
    for name in here.keys() & written.keys():
        for what, value in here[name].items():
            if value != written[name][what]:
                key = f"{KEYS.get(name, name)}.{what}"
                raise ValueError(
                    f"checkpoint {str(path)!r} holds an adapter of {what} {written[name][what]}, but {key}={value}; allowed: "
                    f"{key}={written[name][what]}, or another ckpt_path"
                )
