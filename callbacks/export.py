"""The trained policy in the format of its own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from uae.learner import Network
from uae.trainer import is_dry_run
from uae.weights.low_rank import check_low_rank, merge_adapter, split_adapter
from uae.weights.state import save_state

WRAPPER = "base_model.model."  # PEFT's, before the names of what it wraps


class Export(Callback):
    """Writes what trained at the end of ``fit``: a PEFT adapter after LoRA, a Hugging Face model after full finetuning.

    A renderer that trained weights of its own goes to the subfolder ``renderer``: an adapter, or a denoiser that diffusers loads.

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
        if self.merge and isinstance(policy, Network) and policy.adapted:
            check_low_rank(name for name, _ in policy.model.named_parameters())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the weights on all ranks, write them on the first."""
        log_dir = self.folder or trainer.log_dir  # asking for log_dir is collective
        if is_dry_run(trainer) or trainer.interrupted or log_dir is None:  # a preempted run is not trained yet
            return
        folder = Path(self.folder) if self.folder else Path(log_dir, "export")
        policy = trained(getattr(pl_module, "policy", None))
        if policy is not None:
            module: Any = pl_module
            self._write(folder, policy, trainer.is_global_zero, module.umm.captioner.processor)
        renderer = trained(getattr(pl_module, "image_policy", None))
        if renderer is not None:
            self._write(folder / "renderer", renderer, trainer.is_global_zero)

    def _write(self, folder: Path, policy: Network, here: bool, processor: Any = None) -> None:
        """One policy; of a renderer (without a processor), its denoiser in the layout of diffusers."""
        # A full state dict is gathered by all ranks and handed to the first; the adapter's needs no frozen weights.
        alone = policy.adapted and not self.merge
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=alone)
        weights: dict[str, Any] = get_model_state_dict(policy.model, options=options)
        if not here:
            return
        if alone:
            save_adapter(folder, policy, weights)
            return
        whole = merged(policy, weights) if policy.adapted else weights
        if processor is None:
            policy.base.save_config(folder)
            save_state(folder, "diffusion_pytorch_model", whole)
            return
        # The model writes old names, leaves out tied weights, and adds the generation settings it came with.
        policy.base.save_pretrained(folder, state_dict=whole)
        processor.save_pretrained(folder)


def trained(policy: Any) -> Network | None:
    """The policy, or None if nothing of it trained."""
    return policy if isinstance(policy, Network) and any(p.requires_grad for p in policy.parameters()) else None


def save_adapter(folder: Path, policy: Network, weights: dict[str, Tensor]) -> None:
    """The adapter in training, as PEFT writes it, with the name of the model below it."""
    model: Any = policy.model  # a PeftModel
    config, base = model.peft_config["default"], policy.base
    name = getattr(base, "name_or_path", None) or getattr(base.config, "_name_or_path", None)
    config.base_model_name_or_path = name or config.base_model_name_or_path
    # Adapters hold no embeddings; PEFT's default would look the base up on the hub to be sure.
    model.save_pretrained(folder, state_dict=weights, selected_adapters=["default"], save_embedding_layers=False)


def merged(policy: Network, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model below an adapter, with the adapter added; by the model's own names, in its own dtypes."""
    scales = {
        name: module.scaling["default"]
        for name, module in policy.base.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    plain, factors = split_adapter({name.removeprefix(WRAPPER): value for name, value in weights.items()})
    whole = merge_adapter(plain, factors, lambda layer, _: scales[layer])
    return {name: value.to(plain[name].dtype) for name, value in whole.items()}
