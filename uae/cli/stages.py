r"""Several stages by one command, each starting from what the one before exported: ``fit ... --stage A --stage B``.

    python -m uae.cli fit --config configs/uae.yaml \
        --stage configs/stages/generation_for_understanding.yaml \
        --stage "configs/stages/understanding_for_generation.yaml --trainer.max_steps 500"

A stage is one or more configuration files, and options that hold in it alone. The first stage is an ordinary run; the others
write below its folder. Both halves go on from the export of the stage before, whether or not they train in a stage.
"""

from __future__ import annotations

import gc
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uae.cli.errors import fail
from uae.pictures import draw_columns
from uae.trainer import is_dry_run

OPTION = "--stage"
EXPORT = "export"  # as callbacks.export.Export names it
LORA = "uae.models.finetune.LoRA"


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    Args:
        files: Configuration files.
        options: Options that hold in this stage only.
    """

    files: tuple[str, ...]
    options: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Stage:
        """Read ``FILE [FILE ...] [--key value ...]``, or stop with an error of one line."""
        words = shlex.split(text)
        count = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
        files, options = tuple(words[:count]), tuple(words[count:])
        if not files:
            fail(f"{OPTION} {text!r} names no file; allowed: a configuration file, then options of this stage")
        for file in files:
            if not Path(file).is_file():
                fail(f"{OPTION} {text!r}: there is no file {file!r}; correct {OPTION}")
        if any(option.partition("=")[0] in ("--run_name", "--ckpt_path", "--trainer.default_root_dir") for option in options):
            fail(f"{OPTION} {text!r} has an option of the whole command; give run_name, ckpt_path and default_root_dir outside of it")
        return cls(files, options)

    @property
    def words(self) -> list[str]:
        """The stage as arguments of a single run."""
        return [*(word for file in self.files for word in ("--config", file)), *self.options]

    @property
    def name(self) -> str:
        """The first file's name, without its ending."""
        return Path(self.files[0]).stem


def split(arguments: Sequence[str]) -> tuple[list[str], list[Stage], list[str]]:
    """The arguments before the first ``--stage``, the stages, and the arguments after it."""
    before: list[str] = []
    after: list[str] = []
    stages: list[Stage] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != OPTION:
            (after if stages else before).append(word)
            continue
        if not equals:
            value = next(words, "")
        stages.append(Stage.of(value))
    return before, stages, after


def value_of(arguments: Sequence[str], option: str) -> str | None:
    """The value that an option has on the command line, or None."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else following
    return found


def run_stages(arguments: Sequence[str], run: Callable[[list[str]], Any], read: Callable[[list[str]], Any]) -> Any:
    """Run all stages one after the other.

    Args:
        arguments: The command line, with ``--stage`` at least once.
        run: Runs one command line, and returns the `uae.cli.command.CLI` that did.
        read: Reads one command line, and stops with an error of one line if it cannot be run.

    Returns:
        The command line of the last stage.
    """
    before, stages, after = split(arguments)
    check([*before, *after])
    for stage in stages:
        read([*before, *stage.words, *after])
    cli: Any = None
    folders: dict[str, Path] = {}  # of the stages that are done, by number and label
    root: list[str] = []
    starts: list[str] = []
    for number, stage in enumerate(stages, start=1):
        cli = None  # with its model, before the next one is loaded
        gc.collect()
        torch.cuda.empty_cache()
        cli = run([*before, *stage.words, *after, *root, *starts])
        if cli.trainer.is_global_zero:
            print(f"stage {number} of {len(stages)} is done: {stage.name}", flush=True)
        if is_dry_run(cli.trainer):
            continue
        if cli.trainer.interrupted:
            fail(f"stopped in stage {number} of {len(stages)}; the same command with --ckpt_path last goes on")
        folder = Path(str(cli.trainer.log_dir))
        folders[f"{number} {cli.config[cli.subcommand].label.stage or stage.name}"] = folder
        if number < len(stages):
            root = [f"--trainer.default_root_dir={next(iter(folders.values()))}", f"--run_name={number + 1}-{stages[number].name}"]
            starts = list(starting(folder / EXPORT, starts))
    if folders and cli.trainer.is_global_zero:
        report(folders)
    return cli


def check(arguments: Sequence[str]) -> None:
    """Refuse a command that cannot have stages."""
    if arguments[:1] != ["fit"]:
        fail(f"{OPTION} is of fit, not of {arguments[0] if arguments else 'no subcommand'}: leave it out")
    if any(word.partition("=")[0] == "--print_plan" for word in arguments):
        fail(f"--print_plan is the plan of one stage: give the stage's file as --config instead of {OPTION}")
    checkpoint = value_of(arguments, "--ckpt_path")
    if checkpoint not in (None, "last"):
        fail(f"--ckpt_path {checkpoint!r} is of one run; with {OPTION}, allowed: last, which continues all stages")


def starting(export: Path, earlier: Sequence[str]) -> Iterator[str]:
    """Options with which a stage starts from the export of the one before.

    Args:
        export: Folder of the export; the renderer's half is in its subfolder ``renderer``.
        earlier: Options with which the exporting stage started. The weights below an adapter come from there.
    """
    if not export.is_dir():
        fail(
            f"there is no {str(export)!r} for the next stage to start from: the configuration needs callbacks.export.Export without "
            "a folder of its own; if the stage was killed while it wrote it, raise trainer.max_steps and use --ckpt_path last"
        )
    for key, folder in (("finetune", export), ("image_finetune", export / "renderer")):
        arguments = f"--model.init_args.{key}.init_args"
        if (folder / "adapter_config.json").is_file():
            below = [word for word in earlier if word.startswith(f"{arguments}.weights=")]
            if key == "image_finetune":
                yield f"--model.init_args.{key}={LORA}"
            yield from (*below, f"{arguments}.adapter={folder}")
        elif any(folder.glob("*.safetensors")):
            if key == "image_finetune":
                yield f"--model.init_args.{key}=uae.models.finetune.Full"
            yield f"{arguments}.weights={folder}"


def report(folders: Mapping[str, Path]) -> None:
    """Print and write what all stages changed: ``stages.md``, ``stages.json`` and ``stages.png`` in the first stage's folder."""
    first = next(iter(folders.values()))
    summaries = {name: json.loads(found.read_text()) for name, found in existing(folders, "summary.json")}
    if len(summaries) == len(folders):
        columns = {"start": next(iter(summaries.values()))["before"], **{name: one["after"] for name, one in summaries.items()}}
        (first / "stages.json").write_text(json.dumps(columns, indent=2) + "\n")
        (first / "stages.md").write_text(table(columns) + "\n")
        print(table(columns))
    shown = {name: torch.load(found) for name, found in existing(folders, "examples.pt")}
    if len(shown) == len(folders):
        start = next(iter(shown.values()))
        draw_columns(start["source"], {"start": start["before"], **{name: one["after"] for name, one in shown.items()}}).save(
            first / "stages.png"
        )
        print(f"before and after each stage: {first / 'stages.png'}")


def existing(folders: Mapping[str, Path], name: str) -> list[tuple[str, Path]]:
    """The files of a name in the stages' folders, where they are."""
    return [(stage, folder / name) for stage, folder in folders.items() if (folder / name).is_file()]


def table(columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table: a row per metric, a column per stage."""
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    widths = [max(map(len, names)), *(max(len(title), 7) for title in columns)]
    lines = [["", *columns], ["-" * width for width in widths]]
    for name in names:
        lines.append([name, *(f"{scores[name]:.3f}" if name in scores else "" for scores in columns.values())])
    return "\n".join("| " + " | ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)) + " |" for line in lines)
