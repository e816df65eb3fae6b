"""The trained policy in the format of its own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from uae.models.low_rank import check_low_rank, merge_adapter, split_adapter

WRAPPER = "base_model.model."  # PEFT's, before the names of what it wraps


class Export(Callback):
    """Writes the policy at the end of ``fit``: a PEFT adapter after LoRA, a Hugging Face model after full finetuning.

    ``peft.PeftModel.from_pretrained(base, folder)`` or ``AutoModelForImageTextToText.from_pretrained(folder)`` reads it.

    Args:
        folder: Where to; the default is ``export`` in the log directory.
        merge: After LoRA, write the whole model with the adapter added to its weights, in their dtype. The only way where
            the base is no folder that transformers reads (UAE with its ``llm_lora``, UniWorld-V1).
    """

    def __init__(self, folder: str | None = None, merge: bool = False) -> None:
        self.folder, self.merge = folder, merge

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse now, not after hours of training, an adapter that cannot be merged."""
        policy = getattr(pl_module, "policy", None)
        if self.merge and policy is not None and hasattr(policy.model, "peft_config"):
            check_low_rank(name for name, _ in policy.model.named_parameters())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the weights on all ranks, write them on the first."""
        policy = getattr(pl_module, "policy", None)
        log_dir = self.folder or trainer.log_dir  # asking for log_dir is collective
        if policy is None or trainer.fast_dev_run or log_dir is None:
            return
        # A full state dict is gathered by all ranks and handed to the first; the adapter's needs no frozen weights.
        adapted = hasattr(policy.model, "peft_config")
        alone = adapted and not self.merge
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=alone)
        weights = get_model_state_dict(policy.model, options=options)
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder) if self.folder else Path(log_dir, "export")
        if alone:
            save_adapter(folder, policy, weights)
            return
        # The model writes old names, leaves out tied weights, and adds the generation settings it came with.
        policy.base.save_pretrained(folder, state_dict=merged(policy, weights) if adapted else weights)
        pl_module.umm.captioner.processor.save_pretrained(folder)


def save_adapter(folder: Path, policy: Any, weights: dict[str, Tensor]) -> None:
    """The adapter in training, as PEFT writes it, with the name of the model below it."""
    config = policy.model.peft_config["default"]
    config.base_model_name_or_path = policy.base.name_or_path or config.base_model_name_or_path
    # Adapters hold no embeddings; PEFT's default would look the base up on the hub to be sure.
    policy.model.save_pretrained(folder, state_dict=weights, selected_adapters=["default"], save_embedding_layers=False)


def merged(policy: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model below an adapter, with the adapter added; by the model's own names, in its own dtypes."""
    scales = {
        name: module.scaling["default"]
        for name, module in policy.base.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    plain, factors = split_adapter({name.removeprefix(WRAPPER): value for name, value in weights.items()})
    whole = merge_adapter(plain, factors, lambda layer, _: scales[layer])
    return {name: value.to(plain[name].dtype) for name, value in whole.items()}
