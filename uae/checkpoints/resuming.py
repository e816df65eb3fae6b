"""Resuming: the configuration gives every setting, and the checkpoint gives the state (weights, moments, positions)."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

SETTINGS = "settings"  # key of a checkpoint: the configuration of the run that wrote it
UNTOLD = ("config", "ckpt_path", "run_name", "verbose", "weights_only", "stage", "print_plan", "memory_gib", "check_first_rollout",
          "trainer.callbacks", "trainer.logger", "trainer.default_root_dir", "trainer.enable_progress_bar",
          "trainer.enable_model_summary")  # fmt: skip


# ------------------------------------------------------------------------------------------- optimizer and its schedule


def resumable(optimizer: Optimizer, scheduler: LRScheduler | None = None) -> Any:
    """What ``configure_optimizers`` returns. Loading a checkpoint then changes state only, and no setting.

    Args:
        optimizer: Keeps its learning rate, weight decay and so on. What it remembers of the weights is loaded.
        scheduler: Steps with the optimizer. It keeps its own shape and moves to the position in the checkpoint.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]

    def restore(optimizer: Optimizer) -> None:
        for group, configured in zip(optimizer.param_groups, settings, strict=True):
            for name in group.keys() - configured.keys() - {"params"}:  # of a schedule that is no longer configured
                del group[name]
            group.update(configured)

    optimizer.register_load_state_dict_pre_hook(_check_state)
    optimizer.register_load_state_dict_post_hook(restore)
    if scheduler is None:
        return optimizer
    # Lightning calls these two. All other attributes of a schedule are its shape, which the configuration gives.
    scheduler.state_dict = partial(_position, scheduler)  # type: ignore[method-assign]
    scheduler.load_state_dict = partial(_advance, scheduler)  # type: ignore[method-assign]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def check_memory(optimizer: Optimizer, needed: Collection[str], found: Collection[str]) -> None:
    """Check that a checkpoint holds what an optimizer remembers of a weight.

    Args:
        optimizer: The optimizer of the configuration.
        needed: Names of what it remembers, such as "exp_avg".
        found: Names of what the checkpoint holds. None at all are right: no step was taken, or updates were skipped.

    Raises:
        ValueError: The checkpoint is that of another kind of optimizer.
    """
    if found and set(needed) != set(found):
        raise ValueError(
            f"model.init_args.optimizer is {type(optimizer).__name__} (its state of a weight: {_listed(needed)}), but the checkpoint "
            f"is that of another optimizer ({_listed(found)}); allowed: model.init_args.optimizer as in the run that wrote it, or a "
            "new run from its exported weights, without ckpt_path"
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _check_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Check one weight: a copy of the optimizer takes a step on a weight of the same number of dimensions."""
    found: dict[str, Any] = next(iter(state["state"].values()), {})
    if made := optimizer.state.get(optimizer.param_groups[0]["params"][0]):  # before its first step: Adagrad until torch 2.13
        check_memory(optimizer, made.keys(), found.keys())
        return
    dimensions = max((value.ndim for value in found.values() if isinstance(value, torch.Tensor)), default=2)
    device = optimizer.param_groups[0]["params"][0].device
    weight = nn.Parameter(torch.zeros([2] * dimensions, device=device))
    weight.grad = torch.zeros_like(weight)
    twin = copy.copy(optimizer)
    twin.state, twin.param_groups = defaultdict(dict), [{**optimizer.param_groups[0], "params": [weight]}]
    twin.step()
    check_memory(optimizer, twin.state[weight].keys(), found.keys())


def _position(scheduler: LRScheduler) -> dict[str, Any]:
    return {"last_epoch": scheduler.last_epoch}


def _advance(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    """Step a new schedule to the position in a checkpoint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        while scheduler.last_epoch < state["last_epoch"]:
            try:
                scheduler.step()
            except ValueError as error:  # OneCycleLR has an end
                raise ValueError(
                    f"the schedule of model.init_args.scheduler ends before step {state['last_epoch']}, where the checkpoint is: "
                    f"{error}; give it more steps"
                ) from error


# ------------------------------------------------------------------------------------------------------------ settings


def configuration(trainer: Any) -> dict[str, str]:
    """The configuration by dotted key, as the command line understood it; empty for a trainer that was made in Python."""
    made = (one for one in trainer.callbacks if isinstance(one, SaveConfigCallback))
    return {key: str(value) for one in made for key, value in one.config.items()}


def note_settings(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Put the configuration of a run into its checkpoint."""
    checkpoint[SETTINGS] = configuration(trainer)


def begin_resumed(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Say in one line which settings differ from those of the run that wrote a checkpoint, and prepare its schedules.

    Evaluations are left alone.

    Raises:
        ValueError: The checkpoint holds weights only.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    step = checkpoint["global_step"]
    if "lr_schedulers" not in checkpoint:
        raise ValueError(
            f"checkpoint {str(trainer.ckpt_path)!r} holds weights only (save_weights_only), so no run can continue from it: "
            "give another ckpt_path"
        )
    checkpoint["lr_schedulers"] = checkpoint["lr_schedulers"] or [{"last_epoch": step}]  # a schedule may be new
    changes = differences(checkpoint.get(SETTINGS, {}), configuration(trainer))
    if changes:
        rank_zero_info(f"resumed at step {step} with other settings, which are in force from here: {', '.join(changes)}")
    if 0 <= trainer.max_steps <= step:
        rank_zero_info(
            f"nothing is left to train: the checkpoint is at step {step}, and trainer.max_steps={trainer.max_steps}; to go on, "
            "raise trainer.max_steps"
        )


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Settings of a run that differ from those of another one, as ``key: before -> now``.

    Where a class differs, its arguments are not listed. Where one of the two configurations is unknown, nothing is.
    """
    if not before or not now:
        return []
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and not key.startswith(UNTOLD))
    classes = tuple(key.removesuffix("class_path") for key in keys if key.endswith(".class_path"))
    told = [key for key in keys if key.endswith(".class_path") or not f"{key}.".startswith(classes)]
    return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in told]
