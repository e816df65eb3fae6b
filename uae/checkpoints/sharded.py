"""Checkpoints of a sharded run. They hold trainable parameters only, as a folder of shards or as one file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint import CheckpointException, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from uae.checkpoints.adapters import check_adapters
from uae.checkpoints.files import METADATA, partial_of, publish, read, read_metadata, remove, write
from uae.checkpoints.resuming import check_memory
from uae.checkpoints.shards import PlainPlanner, ShardReader
from uae.checkpoints.trainable import check_trainable_state, trainable_state


class ShardedCheckpoints(ModelParallelStrategy):
    """Saving and loading for `uae.strategy.FSDP2Strategy`."""

    @property
    def _network(self) -> nn.Module:
        assert self.model is not None, "Lightning sets the model before it saves or loads"
        return self.model

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trainable parameters: this process's shards, or all of them on the first process and nothing on the others."""
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True, ignore_frozen_params=True)
        return trainable_state(self._network, get_model_state_dict(self._network, options=options))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state. Its keys are parameter names in shards, and numbers in a file, as in plain PyTorch."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True)
        state = get_optimizer_state_dict(self._network, optimizer, options=options)
        if self._save_distributed_checkpoint or not state:
            return state
        numbers = {name: number for number, name in enumerate(self._names(optimizer))}
        return _renamed(state, numbers)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint under a temporary name, then rename it. All processes must call it.

        Raises:
            OSError: The checkpoint could not be written. An older one of that name is unchanged. For shards, all processes
                raise.
        """
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:  # Lightning would first remove a folder of that name
            super(ModelParallelStrategy, self).save_checkpoint(checkpoint, path, storage_options)
            return
        partial = partial_of(path)
        self._on_first(_start, partial)
        state = {"state_dict": checkpoint.pop("state_dict")}
        state |= {f"optimizer_{i}": one for i, one in enumerate(checkpoint.pop("optimizer_states", []))}
        try:
            dcp.save(state, storage_writer=dcp.FileSystemWriter(partial))
        except CheckpointException as error:  # raised on all processes, whichever of them failed
            self._on_first(remove, partial)
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"checkpoint {str(path)!r} cannot be written by process {rank}: {cause}") from error
        self._on_first(_finish, checkpoint, partial, path)

    def _on_first(self, work: Callable[..., None], *args: Any) -> None:
        """Call a function on the first process. If it fails, all processes raise."""
        error = None
        if self.is_global_zero:
            try:
                work(*args)
            except OSError as failure:
                error = str(failure)
        error = self.broadcast(error)
        if error is not None:
            raise OSError(error)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer states from a folder of shards or a file of any strategy and number of processes.

        Raises:
            FileNotFoundError: The checkpoint does not exist.
            ValueError: The checkpoint is damaged, or its parameters are not the trainable ones of this run.
        """
        path = Path(self.broadcast(checkpoint_path))
        return self._load_shards(path) if path.is_dir() else self._load_file(path)

    def _load_shards(self, path: Path) -> dict[str, Any]:
        content = read_metadata(path)
        stored = ShardReader(path).read_metadata().state_dict_metadata
        prefix = "state_dict."
        shapes = {
            key.removeprefix(prefix): torch.empty(entry.size, device="meta")
            for key, entry in stored.items()
            if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        check_adapters(self._network, content, path)
        check_trainable_state(self._network, shapes, path)
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        weights = trainable_state(self._network, get_model_state_dict(self._network, options=options))
        _read_into({"state_dict": weights}, path)
        set_model_state_dict(self._network, weights, options=options)
        for i, optimizer in enumerate(self.optimizers):
            prefix = f"optimizer_{i}.state."
            fresh = self._fresh(optimizer, {key.rpartition(".")[2] for key in stored if key.startswith(prefix)})
            if fresh is None:
                continue
            state = {f"optimizer_{i}": {"state": fresh["state"]}}
            _read_into(state, path)  # replaces entries that are not tensors, so it is read from the dictionary again
            set_optimizer_state_dict(self._network, optimizer, {**fresh, **state[f"optimizer_{i}"]})
        return content

    def _load_file(self, path: Path) -> dict[str, Any]:
        checkpoint = read(path, mmap=True)
        weights = checkpoint.pop("state_dict")
        check_adapters(self._network, checkpoint, path)
        check_trainable_state(self._network, weights, path)
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self._network, weights, options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", []), strict=False):
            fresh = self._fresh(optimizer, {name for one in state["state"].values() for name in one})
            if fresh is None:
                continue
            named = _renamed(state, dict(enumerate(self._names(optimizer))))["state"]
            set_optimizer_state_dict(self._network, optimizer, {**fresh, "state": named}, options=options)
        return checkpoint

    def _fresh(self, optimizer: Optimizer, found: Collection[str]) -> dict[str, Any] | None:
        """The state of an optimizer as the configuration makes it, or None where the checkpoint holds none to replace it.

        Args:
            optimizer: The optimizer.
            found: Names of what the checkpoint holds of a weight, such as "exp_avg".
        """
        fresh: Any = get_optimizer_state_dict(self._network, optimizer)
        check_memory(optimizer, {name for one in fresh["state"].values() for name in one}, found)
        return fresh if found else None

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of an optimizer's parameters, in its order."""
        names = {parameter: name for name, parameter in self._network.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _start(partial: Path) -> None:
    """Create an empty folder for shards."""
    remove(partial)
    partial.mkdir(parents=True)


def _finish(content: dict[str, Any], partial: Path, path: Path) -> None:
    """Write the rest of a folder of shards and rename it to its final name."""
    try:
        write(content, partial / METADATA)
        publish(partial, path)
    except OSError:
        remove(partial)
        raise


def _read_into(state: dict[str, Any], path: Path) -> None:
    try:
        dcp.load(state, storage_reader=ShardReader(path), planner=PlainPlanner())
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise ValueError(f"checkpoint {str(path)!r} is damaged or does not fit; process {rank}: {cause}") from error


def _renamed(state: Mapping[str, Any], new: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other keys for its parameters."""
    groups = [{**group, "params": [new[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {new[key]: value for key, value in state["state"].items()}, "param_groups": groups}
