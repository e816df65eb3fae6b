"""The trained policy in the format of its own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


class Export(Callback):
    """Writes the policy at the end of ``fit``: a PEFT adapter after LoRA, a Hugging Face model after full finetuning.

    ``peft.PeftModel.from_pretrained(base, folder)`` or ``AutoModelForImageTextToText.from_pretrained(folder)`` reads it.

    Args:
        folder: Where to; the default is ``export`` in the log directory.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the weights on all ranks, write them on the first."""
        policy = getattr(pl_module, "policy", None)
        log_dir = self.folder or trainer.log_dir  # asking for log_dir is collective
        if policy is None or trainer.fast_dev_run or log_dir is None:
            return
        # A full state dict is gathered by all ranks and handed to the first; the adapter's needs no frozen weights.
        adapter = hasattr(policy.model, "peft_config")
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
        weights = get_model_state_dict(policy.model, options=options)
        if trainer.is_global_zero:
            folder = Path(self.folder) if self.folder else Path(log_dir, "export")
            chosen: dict[str, Any] = {"selected_adapters": ["default"]} if adapter else {}
            policy.model.save_pretrained(folder, state_dict=weights, **chosen)
            if not adapter:
                pl_module.umm.captioner.processor.save_pretrained(folder)
