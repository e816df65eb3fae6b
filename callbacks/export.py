"""Writes the trained weights in the format of their own library."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from uae.checkpoints.files import partial_of, publish, remove
from uae.files.locations import local_folder
from uae.learner import Network
from uae.models.bagel.model import Bagel
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.engine import unwrapped
from uae.models.flow.network import FlowNetwork
from uae.module import UnifiedGRPO
from uae.trainer import is_dry_run
from uae.weights.low_rank import check_low_rank, merge_adapter, split_adapter
from uae.weights.state import save_state

WRAPPER = "base_model.model."  # prefix that PEFT puts before the names of the wrapped model


class Export(Callback):
    """Writes the trained weights at the end of ``fit``: a PEFT adapter after LoRA, a Hugging Face model after full finetuning.

    A renderer that trained weights of its own goes to the subfolder ``renderer``: an adapter, or a denoiser that diffusers loads.
    A half that did not train, but started from what an earlier run exported, is copied from there, so that this folder has all
    that was learnt.

    ``peft.PeftModel.from_pretrained(base, folder)`` or ``AutoModelForImageTextToText.from_pretrained(folder)`` reads it.

    Args:
        folder: Folder that is written, which must be empty when a run begins; None is ``export`` in the log directory.
            What an earlier part of the same run exported is replaced as a whole.
        merge: After LoRA, write the whole model with the adapter added to its weights, in their dtype. Necessary if the
            model below the adapter is no folder that transformers can load (UAE with its ``llm_lora``, UniWorld-V1).
    """

    def __init__(self, folder: str | None = None, merge: bool = False) -> None:
        self.folder, self.merge = folder, merge

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the training, not after it, that the folder is empty and that the adapter can be merged.

        Raises:
            ValueError: The folder has files, and this is a new run.
        """
        if self.folder and trainer.ckpt_path is None and Path(self.folder).is_dir() and any(Path(self.folder).iterdir()):
            raise ValueError(
                f"folder={self.folder!r} of callbacks.export.Export holds files of something else; allowed: an empty or new folder"
            )
        policy = getattr(pl_module, "policy", None)
        if self.merge and isinstance(policy, Network) and policy.adapted:
            check_low_rank(name for name, _ in policy.model.named_parameters())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the weights with all ranks, and write them on the first."""
        log_dir = self.folder or trainer.log_dir  # reading log_dir is a collective operation
        if is_dry_run(trainer) or trainer.interrupted or log_dir is None:  # a preempted run is not trained yet
            return
        final = Path(self.folder) if self.folder else Path(log_dir, "export")
        folder = partial_of(final)  # a folder of its own, so that nothing of an earlier export remains among the files
        if trainer.is_global_zero:
            remove(folder)
        policy = trained(getattr(pl_module, "policy", None))
        if policy is not None:
            module: Any = pl_module
            captioner = unwrapped(module.umm.captioner)
            processor = captioner.processor if isinstance(captioner, HFCaptioner) else None
            self._write(folder, policy, trainer.is_global_zero, processor)
        renderer = trained(getattr(pl_module, "image_policy", None))
        if renderer is not None:
            self._write(folder / "renderer", renderer, trainer.is_global_zero)
        if trainer.is_global_zero:
            copy_untrained(pl_module, folder)
            if folder.is_dir():
                publish(folder, final)

    def _write(self, folder: Path, policy: Network, here: bool, processor: Any = None) -> None:
        """Write one policy in the layout of its library; one of no library as ``model.safetensors``."""
        # A full state dict is gathered by all ranks and handed to the first; the adapter's needs no frozen weights.
        alone = policy.adapted and not self.merge
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=alone)
        weights: dict[str, Any] = get_model_state_dict(policy.model, options=options)
        weights |= frozen_factors(policy.model) if alone else {}
        if not here:
            return
        if alone:
            save_adapter(folder, policy, weights)
            return
        whole = merged(policy, weights) if policy.adapted else weights
        if isinstance(policy, FlowNetwork):
            policy.base.save_config(folder)
            save_state(folder, "diffusion_pytorch_model", whole)
        elif processor is None:
            save_state(folder, "model", whole)
        else:
            if isinstance(policy.base, Bagel):
                policy.base.save_pretrained(folder, whole)
            else:
                save_model(folder, policy.base, whole)
            processor.save_pretrained(folder)


def copy_untrained(module: LightningModule, folder: Path) -> None:
    """Copy what an earlier run exported of a half that did not train in this one."""
    if not isinstance(module, UnifiedGRPO):
        return
    halves = ((module.policy, module.finetune, folder), (module.image_policy, module.image_finetune, folder / "renderer"))
    for policy, finetune, place in halves:
        if trained(policy) is None and finetune is not None and finetune.origin is not None:
            key = f"{finetune.key}.{'weights' if finetune.adapter is None else 'adapter'}"
            place.mkdir(parents=True, exist_ok=True)
            for file in local_folder(finetune.origin, key).iterdir():
                if file.is_file():  # the subfolder is of the other half
                    shutil.copyfile(file, place / file.name)


def save_model(folder: Path, model: Any, weights: dict[str, Tensor]) -> None:
    """Write a model of transformers: weights by their names on disk, without tied ones, and the settings that it came with."""
    from transformers import GenerationConfig

    settings = model.generation_config
    model.generation_config = GenerationConfig()  # before 5.23, transformers refuses to write settings that it has read
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.generation_config = settings
    settings.to_json_file(folder / "generation_config.json")


def frozen_factors(model: Any) -> dict[str, Tensor]:
    """The factors of the adapter that did not train, as only the other half of the model uses them. Collective."""
    frozen = {name: one.detach() for name, one in model.named_parameters() if not one.requires_grad}
    factors = {name: one for name, one in frozen.items() if "lora_" in name and ".default" in name}
    return {name: (one.full_tensor() if isinstance(one, DTensor) else one).cpu() for name, one in factors.items()}


def trained(policy: Any) -> Network | None:
    """The policy, or None if none of its weights trained."""
    return policy if isinstance(policy, Network) and any(p.requires_grad for p in policy.parameters()) else None


def save_adapter(folder: Path, policy: Network, weights: dict[str, Tensor]) -> None:
    """Write the trained adapter in PEFT's format, with the name of the model below it."""
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
