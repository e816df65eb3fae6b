"""A system as a configuration describes it, ready to caption and draw: ``--config FILE [--ckpt_path FILE] [--key value]``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from uae.bench.fingerprints import sha256
from uae.checkpoints.files import read, read_metadata
from uae.checkpoints.shards import PlainPlanner, ShardReader
from uae.checkpoints.trainable import check_trainable_state, trainable_state
from uae.cli import CLI
from uae.evaluation import AutoEncoder
from uae.types import UMM

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class LoadedSystem:
    """A system on its device.

    Args:
        module: As configured, with the checkpoint's weights; its reward and metrics are not loaded.
        device: Where everything is.
        identity: The resolved configuration of the model, and the checkpoint: results of equal identity may be mixed.
        precision: A context to caption and draw in.
    """

    module: AutoEncoder
    device: torch.device
    identity: dict[str, Any]
    precision: Callable[[], AbstractContextManager[Any]]

    @property
    def umm(self) -> UMM:
        """The three roles."""
        assert self.module.umm is not None
        return self.module.umm


class _ParsedConfiguration(CLI):
    """The command line of ``predict`` up to the point where something would run."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: the trainer would ask for every device."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


class _Unscored:
    """In the place of a reward, whose encoders nothing here looks through."""

    def load(self, device: Any = "cpu") -> _Unscored:
        return self


def load(words: Sequence[str], device: str | None = None) -> LoadedSystem:
    """Build a system and give it a checkpoint's weights.

    Args:
        words: As behind ``python -m uae.cli predict``.
        device: Where to; None is the first GPU, or the CPU.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The configuration is of no auto-encoder, or the checkpoint is of another one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        described = _ParsedConfiguration(["predict", *words])
    config, module = described.config["predict"], described.model
    check_auto_encoder(module)
    module.reward, module.unified_score = _Unscored(), None  # type: ignore[assignment]
    module.configure_model()
    place = working_device(device)
    if config.ckpt_path is not None:
        read_checkpoint(module, config.ckpt_path)
    module.eval().requires_grad_(False).to(place)
    for part in (module.umm.captioner, module.umm.conditioner, module.umm.renderer):  # type: ignore[union-attr]
        part.to(place)
    identity = {"model": _plain(config.model), "checkpoint": None if config.ckpt_path is None else sha256(config.ckpt_path)}
    return LoadedSystem(module, place, identity, _precision(config.trainer.precision, place))


def check_auto_encoder(module: Any) -> None:
    """Refuse a configuration of anything else.

    Raises:
        ValueError: The model neither captions nor draws.
    """
    if not isinstance(module, AutoEncoder):
        raise ValueError(
            f"model={type(module).__name__} neither captions nor draws; give a complete run of uae.module.UnifiedGRPO "
            "(configs/*.yaml)"
        )


def working_device(name: str | None) -> torch.device:
    """The device of that name; for None the first GPU, or the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def read_checkpoint(module: AutoEncoder, path: str | Path) -> None:
    """Give a module the weights that a run saved: a file, or the folder of a sharded run.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, no checkpoint, or does not hold exactly what trains.
    """
    path = Path(path)
    if path.is_dir():
        read_metadata(path)
        reader, prefix = ShardReader(path), "state_dict."
        stored = reader.read_metadata().state_dict_metadata
        weights = {key.removeprefix(prefix): torch.empty(stored[key].size) for key in stored if key.startswith(prefix)}
        dcp.load({"state_dict": weights}, storage_reader=reader, planner=PlainPlanner(), no_dist=True)
    else:
        weights = read(path, mmap=True)["state_dict"]
    check_trainable_state(module, weights, path)
    module.load_state_dict(trainable_state(module, weights), strict=False)


def _precision(setting: Any, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    return partial(torch.autocast, device.type, AUTOCAST[setting]) if setting in AUTOCAST else nullcontext


def _plain(node: Any) -> Any:
    return node.as_dict() if hasattr(node, "as_dict") else node
