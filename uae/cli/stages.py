"""Several stages of training by one command: ``fit --config RUN --stage "FILE OPTIONS" --stage "FILE OPTIONS"``.

Each stage is a run of its own, in the same process. The first has a folder like any run, the others have theirs below it. A
stage starts from what the one before exported, so the last export holds all that was learnt.
"""

from __future__ import annotations

import gc
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from uae.cli.errors import fail
from uae.cli.explain import named
from uae.console.ending import ending
from uae.files.packaged import configuration
from uae.files.stage_report import Trained, report
from uae.report.run_page import PAGE, write_run_page
from uae.trainer import is_dry_run, was_preempted

OPTION = "--stage"
SUBCOMMANDS = ("fit", "validate", "test", "predict")
OF_THE_CHAIN = ("--run_name", "--ckpt_path", "--trainer.default_root_dir", "--print_plan")  # no stage has its own
TRAINS = {"finetune": ("captions", "both"), "image_finetune": ("images", "both")}  # by the key below model.init_args
LORA, FULL = "uae.models.finetune.LoRA", "uae.models.finetune.Full"
HALVES = {"finetune": "", "image_finetune": "renderer"}  # the key below model.init_args, and the subfolder of an export
R = TypeVar("R", bound=LightningCLI)
say = rank_zero_only(print)


@dataclass(frozen=True)
class Stage:
    """One stage of a command.

    Args:
        number: Its number, from 1.
        files: Configuration files that are put on top of those of the command.
        options: Options that hold in this stage only.
    """

    number: int
    files: list[str]
    options: list[str]

    @property
    def name(self) -> str:
        """Name of its folder below the folder of the first stage."""
        return f"{self.number}-{Path(self.files[0]).stem}"

    @property
    def words(self) -> list[str]:
        """What stands in the command where ``--stage`` stood."""
        return [*(word for file in self.files for word in ("--config", file)), *self.options]


@dataclass(frozen=True)
class Start:
    """What a half of the model starts from: exports of earlier stages; neither is what the configuration gives."""

    adapter: str | None = None
    weights: str | None = None


def say_ending(command: LightningCLI, words: list[str], first: Path | None = None) -> None:
    """After ``fit``, print where everything is and what can be done with it.

    Args:
        command: The run, or that of the last stage.
        words: The whole command line.
        first: The folder of the first stage; None if there are no stages.
    """
    trainer = command.trainer
    if command.subcommand != "fit" or is_dry_run(trainer):
        return
    result = Path(trainer.log_dir or ".")  # a broadcast, which all processes must take part in
    if trainer.is_global_zero:
        events = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        print(ending(first or result, result, words, trainer.max_steps, events), flush=True)


def asks_for_stages(words: list[str]) -> bool:
    """Whether a command line trains in stages."""
    subcommand = next((word for word in words if word in SUBCOMMANDS), None)
    return subcommand == "fit" and any(word == OPTION or word.startswith(f"{OPTION}=") for word in words)


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
                if (done[0].folder / PAGE).is_file():
                    write_run_page(done[0].folder)  # again, with the table of all stages
            say_ending(command, words, done[0].folder)
            return command
        starts = {} if dry else exported(starts, settings, folder, stage.number)
        del command
        gc.collect()  # the networks of this stage, before those of the next are loaded
        torch.cuda.empty_cache()
    raise AssertionError("there is always a last stage")


# ------------------------------------------------------------------------------------------------- what is asked for


def split(words: list[str]) -> tuple[list[str], list[Stage], list[str]]:
    """The command before its first stage, its stages, and the rest of the command."""
    values: list[str] = []
    kept: list[list[str]] = [[]]
    rest = iter(words)
    for word in rest:
        if word != OPTION and not word.startswith(f"{OPTION}="):
            kept[-1].append(word)
            continue
        values.append(next(rest, "") if word == OPTION else word.removeprefix(f"{OPTION}="))
        kept.append([])
    return kept[0], [_stage(number, value) for number, value in enumerate(values, 1)], sum(kept[1:], [])


def _stage(number: int, value: str) -> Stage:
    at = f"{OPTION} {value!r} (stage {number})"
    try:
        words = shlex.split(value)
    except ValueError as error:
        fail(f"{at} cannot be read ({error}); allowed: configuration files, then options of this stage, all in one pair of quotes")
    first = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    if not first:
        fail(f"{at} names no configuration file; allowed: files, then options of this stage, all in one pair of quotes")
    try:
        files = [configuration(file, at) for file in words[:first]]
    except FileNotFoundError as error:
        fail(f"{error}; the options of a stage stand behind its files, all in one pair of quotes")
    for word in words[first:]:
        if word.split("=")[0] in OF_THE_CHAIN:
            fail(f"{at}: {word.split('=')[0]} is of the whole command, which gives every stage a folder; write it outside of {OPTION}")
    return Stage(number, files, words[first:])


def check(stages: list[Namespace]) -> None:
    """Refuse what would fail only after the first stage has been trained.

    Args:
        stages: The settings of every stage.
    """
    for number, settings in enumerate(stages, 1):
        _check_command(number, settings)
        if not settings["trainer.fast_dev_run"]:
            _check_callbacks(number, settings, last=number == len(stages))
    for half in TRAINS:
        _check_half(half, stages)


def _check_command(number: int, settings: Namespace) -> None:
    if settings["print_plan"]:
        fail(f"--print_plan is of one run: give the file of a stage as --config instead of {OPTION}")
    if settings["ckpt_path"] not in (None, "last"):
        fail(f"--ckpt_path {settings['ckpt_path']} with {OPTION}; allowed: last, which continues the stages where they stopped")
    path = settings["model.class_path"]
    if not _is_a(path, "uae.module.UnifiedGRPO"):
        fail(f"stage {number} has model.class_path={path}; allowed in {OPTION}: uae.module.UnifiedGRPO; run that by itself, before")


def _check_callbacks(number: int, settings: Namespace, last: bool) -> None:
    export = _export_of(settings)
    if export is None and not last:
        fail(f"stage {number} exports nothing that the next could start from: add callbacks.export.Export to trainer.callbacks")
    if export is not None and export.get("folder"):
        fail(f"folder={export['folder']!r} of callbacks.export.Export would be that of every stage; allowed with {OPTION}: null")
    for callback in settings["trainer.callbacks"] or ():
        if dirpath := _arguments(callback).get("dirpath"):
            fail(f"dirpath={dirpath!r} of {callback.class_path} would be that of every stage; allowed with {OPTION}: null")


def _check_half(half: str, stages: list[Namespace]) -> None:
    """Refuse stages whose start in one half of the model would be another one than what the stages before have exported."""
    exporting, adapting = 0, 0  # the stages that have last exported this half, and an adapter of it
    for number, settings in enumerate(stages, 1):
        finetune = settings[f"model.init_args.{half}"]
        given = _arguments(finetune)
        for name in ("adapter", "weights"):
            if exporting and given.get(name):
                key = f"model.init_args.{half}.init_args.{name}"
                fail(
                    f"stage {number} has {key}={given[name]}, but starts from what stage {exporting} exports: give {key} among the "
                    f"options of the first {OPTION} only"
                )
        if adapting and _is_a(_class_of(settings, half), FULL):
            _refuse_adapter(half, f"stage {number}", f"stage {adapting}")
        if settings["model.init_args.train"] in TRAINS[half]:
            adapts = _is_a(_class_of(settings, half), LORA) and not (_export_of(settings) or {}).get("merge")
            exporting, adapting = number, number if adapts else 0
        elif given.get("adapter") or given.get("weights"):
            exporting, adapting = number, number if given.get("adapter") else 0


def _export_of(settings: Namespace) -> dict[str, Any] | None:
    """The arguments of the callback that exports, or None if there is none."""
    callbacks = settings["trainer.callbacks"] or ()
    return next((_arguments(one) for one in callbacks if _is_a(one.class_path, "callbacks.export.Export")), None)


def _arguments(of_class: Namespace | None) -> dict[str, Any]:
    """The arguments of a class that a configuration names, or none."""
    given = None if of_class is None else of_class.get("init_args")
    return {} if given is None else vars(given)


def _is_a(class_path: str | None, base: str) -> bool:
    """Whether a dotted name is that of a class, or of a subclass of it."""
    found = named(class_path) if class_path else None
    return isinstance(found, type) and any(f"{one.__module__}.{one.__qualname__}" == base for one in found.__mro__)


def _class_of(settings: Namespace, half: str) -> str | None:
    """The class that finetunes a half of the model."""
    finetune: Namespace | None = settings[f"model.init_args.{half}"]
    return None if finetune is None else str(finetune.class_path)


def _refuse_adapter(half: str, who: str, where: str) -> NoReturn:
    """Refuse to start full finetuning from an adapter."""
    fail(
        f"{who} has model.init_args.{half}={FULL}, which starts from whole weights, but {where} exports an adapter: set "
        "merge: true of callbacks.export.Export"
    )


# ---------------------------------------------------------------------------------------------- from stage to stage


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
            below = _arguments(settings[f"model.init_args.{half}"]).get("weights")
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
        key, kind = f"--model.init_args.{half}", _class_of(settings, half)
        if start.adapter and _is_a(kind, FULL):
            _refuse_adapter(half, "the next stage", start.adapter)
        if kind is None:
            options.append(f"{key}={LORA if start.adapter else FULL}")
        options += [f"{key}.init_args.adapter={start.adapter}"] if start.adapter else []
        options += [f"{key}.init_args.weights={start.weights}"] if start.weights else []
    return options
