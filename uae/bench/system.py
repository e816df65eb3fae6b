"""Build a system from the words of a command line: ``--config FILE [--ckpt_path FILE] [--key value]``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from jsonargparse import Namespace
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from uae.bench.fingerprints import checkpoints, sha256
from uae.bench.output_folder import WEIGHTS
from uae.checkpoints.adapters import check_adapters
from uae.checkpoints.files import read, read_metadata
from uae.checkpoints.shards import PlainPlanner, ShardReader
from uae.checkpoints.trainable import check_trainable_state, trainable_state
from uae.cli import CLI
from uae.evaluation import AutoEncoder
from uae.types import UMM

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PRECISIONS = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's short names
NOT_DRAWING = ("reward", "unified_score", "metrics")  # settings of a model whose checkpoints change no image


@dataclass(frozen=True)
class LoadedSystem:
    """A system on its device, ready to caption and to draw.

    Args:
        module: The configured module with the checkpoint's weights; its reward and metrics are not loaded.
        device: Device of all weights.
        config: Resolved configuration of ``predict``.
        precision: Makes the autocast context in which the system captions and draws.
    """

    module: AutoEncoder
    device: torch.device
    config: Namespace
    precision: Callable[[], AbstractContextManager[object]]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What `identity` says of the system. Images of systems with equal identities may lie in one folder."""
        return identity(self.config)

    @property
    def umm(self) -> UMM:
        """The captioner, the conditioner and the renderer of the module."""
        assert self.module.umm is not None
        return self.module.umm


class _ParsedConfiguration(CLI):
    """Parses the command line of ``predict`` and builds the model, but no trainer, and runs nothing."""

    def instantiate_trainer(self, **kwargs: object) -> None:  # type: ignore[override]  # Lightning only keeps what this returns
        """Build no trainer, since a trainer would claim every device."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


class _NoReward:
    """Stands in for the configured reward, so that the encoders of the reward are not loaded."""

    def load(self, device: torch.device | str = "cpu") -> _NoReward:
        return self


def load(words: Sequence[str], device: str | None = None) -> LoadedSystem:
    """Build a system and load a checkpoint's weights into it.

    Args:
        words: The words behind ``python -m uae.cli predict``.
        device: Name of the device; None is the first GPU, or the CPU if there is none.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The configured model cannot caption and draw, or the checkpoint belongs to another model.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        parsed = _ParsedConfiguration(["predict", *words])
    config, module = parsed.config["predict"], auto_encoder(parsed.model)
    module.unified_score = None
    module.reward = _NoReward()  # type: ignore[assignment]  # never called here; the real one would load its encoders
    module.configure_model()
    place = working_device(device)
    if config.ckpt_path is not None:
        read_checkpoint(module, config.ckpt_path)
    module.eval().requires_grad_(False).to(place)
    system = LoadedSystem(module, place, config, _precision(config.trainer.precision, place))
    roles: tuple[Any, ...] = (system.umm.captioner, system.umm.conditioner, system.umm.renderer)  # protocols without ``to``
    for role in roles:
        role.to(place)
    return system


def identity(config: Namespace, leave_out: tuple[str, ...] = NOT_DRAWING) -> dict[str, Any]:
    """Everything that an image of a prompt follows from, but for the prompt and its seed.

    Args:
        config: Resolved configuration of ``predict``.
        leave_out: Settings of the model whose checkpoints do not count.

    Returns:
        The configuration of the model (``model``), the content of the checkpoints that its system names (``weights``), that of
        the run's checkpoint (``checkpoint``), and the numbers that it computes with (``precision``).

    Raises:
        FileNotFoundError: The run's checkpoint does not exist.
    """
    if config.ckpt_path is not None and not Path(config.ckpt_path).exists():
        raise FileNotFoundError(f"no checkpoint at {config.ckpt_path!r}; correct --ckpt_path (a file, or the folder of a sharded run)")
    model: Any = _plain(config.model)
    return {
        "model": model,
        WEIGHTS: weights_of(config, leave_out),
        "checkpoint": None if config.ckpt_path is None else sha256(config.ckpt_path),
        "precision": _precision_name(config.trainer.precision),
    }


def weights_of(config: Namespace, leave_out: tuple[str, ...], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """The checkpoints that a model's configuration names, see `uae.bench.fingerprints.checkpoints`."""
    model: Any = _plain(config.model)
    return checkpoints({key: value for key, value in model.get("init_args", {}).items() if key not in leave_out}, known)


def auto_encoder(module: object) -> AutoEncoder:
    """Return a configured module if it can caption and draw.

    Raises:
        ValueError: The module is of another kind.
    """
    if not isinstance(module, AutoEncoder):
        raise ValueError(
            f"model={type(module).__name__} neither captions nor draws; give a complete run of uae.module.UnifiedGRPO "
            "(configs/*.yaml) by --config"
        )
    return module


def working_device(name: str | None) -> torch.device:
    """The device of a name; for None the first GPU, or the CPU if there is none."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def read_checkpoint(module: AutoEncoder, path: str | Path) -> None:
    """Load the weights that a training run saved.

    Args:
        module: Configured module; it gets the weights.
        path: Checkpoint file, or the folder of a sharded run.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The checkpoint is damaged, or does not hold exactly the trained weights of this module.
    """
    path = Path(path)
    if path.is_dir():
        content = read_metadata(path)
        reader, prefix = ShardReader(path), "state_dict."
        stored = reader.read_metadata().state_dict_metadata
        weights = {
            key.removeprefix(prefix): torch.empty(entry.size)
            for key, entry in stored.items() if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }  # fmt: skip
        dcp.load({"state_dict": weights}, storage_reader=reader, planner=PlainPlanner(), no_dist=True)
    else:
        content = read(path, mmap=True)
        weights = content["state_dict"]
    check_adapters(module, content, path)
    check_trainable_state(module, weights, path)
    module.load_state_dict(trainable_state(module, weights), strict=False)


def _precision(setting: str | int | None, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    name = _precision_name(setting)
    if name not in AUTOCAST and name != "32-true":
        raise ValueError(
            f"trainer.precision={setting}; allowed where no trainer runs: 32-true, {', '.join(AUTOCAST)}; correct --trainer.precision "
            "(the type of the weights is a setting of model.init_args.system)"
        )
    dtype = AUTOCAST.get(name)
    return nullcontext if dtype is None else partial(torch.autocast, device.type, dtype)


def _precision_name(setting: str | int | None) -> str:
    return PRECISIONS.get(str(setting), str(setting))


def _plain(node: object) -> object:
    return node.as_dict() if isinstance(node, Namespace) else node
