"""Checkpoints of a sharded run: what trains and nothing else, as a folder of shards or as one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from uae.trainable import check_trainable_state, trainable_state

METADATA = "meta.pt"  # Lightning's name for what is neither weights nor optimizer states


class ShardedCheckpoints(ModelParallelStrategy):
    """Saving and loading for `uae.strategy.FSDP2Strategy`."""

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """What trains; shards, or everything on the first process (nothing elsewhere)."""
        options = StateDictOptions(
            full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True, ignore_frozen_params=True
        )
        return trainable_state(self.model, get_model_state_dict(self.model, options=options))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """By parameter name in shards, by number in a file, as any optimizer's own ``state_dict``."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        if self._save_distributed_checkpoint or not state:
            return state
        numbers = {name: number for number, name in enumerate(self._names(optimizer))}
        return _renamed(state, numbers)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and optimizer states from a folder of shards or a file, whatever strategy or world size wrote it.

        Raises:
            ValueError: The checkpoint does not hold exactly what trains here.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {str(path)!r}: correct ckpt_path")
        return self._load_shards(path, weights_only) if path.is_dir() else self._load_file(path, weights_only)

    def _load_shards(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        prefix = "state_dict."
        shapes = {key: torch.empty(stored[key].size, device="meta") for key in stored if key.startswith(prefix)}
        check_trainable_state(self.model, {key.removeprefix(prefix): value for key, value in shapes.items()})
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        state = {"state_dict": trainable_state(self.model, get_model_state_dict(self.model, options=options))}
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(self.model, state["state_dict"], options=options)
        for i, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{i}": get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, checkpoint_id=path)
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{i}"])
        return torch.load(path / METADATA, weights_only=weights_only)

    def _load_file(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        weights = checkpoint.pop("state_dict")
        check_trainable_state(self.model, weights)
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.model, weights, options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", []), strict=False):
            named = _renamed(state, dict(enumerate(self._names(optimizer))))
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of an optimizer's parameters, in its order."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: Mapping[str, Any], new: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other keys for its parameters."""
    groups = [{**group, "params": [new[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {new[key]: value for key, value in state["state"].items()}, "param_groups": groups}
