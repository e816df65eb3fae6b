"""One stage after the other, each from what the one before exported."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from uae.cli.errors import fail
from uae.cli.stages.arguments import FULL, LORA, Stage, arguments, check, class_of, is_a, refuse_adapter, split
from uae.cli.stages.report import Trained, report
from uae.trainer import is_dry_run, was_preempted

HALVES = {"finetune": "", "image_finetune": "renderer"}  # the key below model.init_args, and the subfolder of an export
R = TypeVar("R", bound=LightningCLI)
say = rank_zero_only(print)


@dataclass(frozen=True)
class Start:
    """What a half of the model starts from: exports of earlier stages; neither is what the configuration gives."""

    adapter: str | None = None
    weights: str | None = None


def train_in_stages(words: list[str], run: Callable[[list[str]], R], parse: Callable[[list[str]], LightningCLI]) -> R:
    """Run all stages of a command, one after the other.

    Args:
        words: The command line.
        run: Runs a command line of one stage.
        parse: Parses one, without making anything of it.

    Returns:
        What ``run`` returned of the last stage that was run.
    """
    before, stages, after = split(words)
    asked = [_settings(parse([*before, *stage.words, *after])) for stage in stages]
    check(asked)
    done: list[Trained] = []
    starts: dict[str, Start] = {}
    for stage, settings in zip(stages, asked, strict=True):
        say(f"stage {stage.number} of {len(stages)}: {' '.join(stage.files)}")
        below = _below(done[0].folder, stage) if done else []
        command = run([*before, *stage.words, *after, *below, *start_options(starts, settings)])
        dry, settings = is_dry_run(command.trainer), _settings(command)
        folder = Path(command.trainer.log_dir or ".")  # a broadcast, so that all processes have written what they write
        done.append(Trained(f"{stage.number} {settings['model.init_args.train']}", stage.files, folder))
        if was_preempted(command.trainer):
            say(f"stopped in stage {stage.number} of {len(stages)}: the same command with --ckpt_path last goes on")
            return command
        if stage.number == len(stages):
            if command.trainer.is_global_zero and not dry:
                report(done)
            return command
        starts = {} if dry else exported(starts, settings, folder, stage.number)
        del command
        gc.collect()  # the networks of this stage, before those of the next are loaded
        torch.cuda.empty_cache()
    raise AssertionError("there is always a last stage")


def _settings(command: LightningCLI) -> Namespace:
    settings: Namespace = command.config[str(command.config["subcommand"])]
    return settings


def _below(first: Path, stage: Stage) -> list[str]:
    return [f"--trainer.default_root_dir={first}", f"--run_name={stage.name}"]


def exported(starts: dict[str, Start], settings: Namespace, folder: Path, number: int) -> dict[str, Start]:
    """What the next stage starts from.

    Args:
        starts: What this stage started from.
        settings: The settings of this stage.
        folder: The folder of this stage.
        number: Its number, for errors.
    """
    export, found = folder / "export", dict(starts)
    if not export.is_dir():
        fail(
            f"stage {number} has left nothing in {str(export)!r} for the next one to start from: raise its trainer.max_steps by "
            "one rollout, and go on with --ckpt_path last"
        )
    for half, subfolder in HALVES.items():
        place = export / subfolder
        if (place / "adapter_config.json").is_file():
            below = arguments(settings[f"model.init_args.{half}"]).get("weights")
            found[half] = Start(adapter=str(place), weights=below)
        elif place.is_dir() and any(file.is_file() for file in place.iterdir()):
            found[half] = Start(weights=str(place))
    return found


def start_options(starts: dict[str, Start], settings: Namespace) -> list[str]:
    """The options by which a stage starts from what the one before exported.

    Args:
        starts: By half.
        settings: The settings of the stage without them.
    """
    options = []
    for half, start in starts.items():
        key, kind = f"--model.init_args.{half}", class_of(settings, half)
        if start.adapter and is_a(kind, FULL):
            refuse_adapter(half, "the next stage", start.adapter)
        if kind is None:
            options.append(f"{key}={LORA if start.adapter else FULL}")
        options += [f"{key}.init_args.adapter={start.adapter}"] if start.adapter else []
        options += [f"{key}.init_args.weights={start.weights}"] if start.weights else []
    return options
