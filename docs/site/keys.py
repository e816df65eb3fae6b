"""Pages of all keys of ``python -m uae.cli fit``, read from its parser and from the classes that configs/ names."""

from __future__ import annotations

import html
import re
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser

ROOT = Path(__file__).parents[2]
TITLES = {  # and what is typed before the keys of a page
    "run": ("Keys of a run", "Behind `python -m uae.cli fit`, or at the top of a configuration."),
    "trainer": ("Keys of trainer", "Lightning's trainer, and then classes for its keys `strategy`, `profiler` and `plugins`."),
    "model": (
        "Keys of model",
        "`model.class_path` names a class, and its keys follow `model.init_args.`; those of an objective follow "
        "`model.init_args.objective.init_args.`, and those of the optimizer `model.init_args.optimizer.init_args.`.",
    ),
    "data": ("Keys of data", "`data.class_path` names a class, and its keys follow `data.init_args.`."),
    "systems": ("Systems", "`model.init_args.system.class_path` names one, and its keys follow `model.init_args.system.init_args.`."),
    "finetune": (
        "What trains",
        "The keys follow `model.init_args.finetune.init_args.`, and for a renderer `model.init_args.image_finetune.init_args.`.",
    ),
    "losses": ("Losses", "The keys follow `model.init_args.loss.`, and for the actions of a renderer `model.init_args.image_loss.`."),
    "rewards": ("Rewards", "The keys of a part called NAME follow `model.init_args.reward.init_args.parts.NAME.init_args.`."),
    "encoders": ("Encoders and metrics", "Rewards and metrics name encoders by `class_path`, and their keys follow in `init_args`."),
    "callbacks": ("Callbacks and loggers", "`trainer.callbacks` and `trainer.logger` are lists of `class_path` and `init_args`."),
}
PAGE_OF = {  # by how a class path begins
    "uae.module.": "model", "uae.coldstart.": "model", "uae.miniature.pretraining.": "model", "torch.optim.": "model",
    "uae.data.": "data", "uae.miniature.data.": "data",
    "uae.miniature.tiny.Tiny": "systems", "uae.miniature.tiny_janus.": "systems", "uae.systems.": "systems",
    "uae.models.finetune.": "finetune",
    "uae.grpo.": "losses",
    "uae.rewards.": "rewards", "uae.miniature.tiny.SceneFormat": "rewards",
    "uae.miniature.tiny.TinyCLIP": "encoders", "uae.miniature.tiny.TinyJudge": "encoders", "uae.encoders.": "encoders",
    "uae.metrics.": "encoders", "uae.miniature.metrics.": "encoders",
    "callbacks.": "callbacks", "uae.miniature.callbacks.": "callbacks", "uae.loggers.": "callbacks",
    "lightning.pytorch.callbacks.": "callbacks",
    "uae.strategy.": "trainer", "lightning.pytorch.profilers.": "trainer", "lightning.pytorch.plugins.": "trainer",
}  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to the site."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, f"configuration/{name}.md", content=text))
    return files


def pages() -> dict[str, str]:
    """Markdown of all pages, by name."""
    from uae.cli.command import Parsed

    command = Parsed(["fit", "--config", str(ROOT / "configs/tiny.yaml")])
    actions = list(shown(command._parser("fit")))
    trainer = [action for action in actions if action.dest.startswith("trainer.")]
    found = {name: f"# {title}\n\n{text}\n\n" for name, (title, text) in TITLES.items()}
    found["run"] += table([action for action in actions if action not in trainer])
    found["trainer"] += table(trainer)
    for path in class_paths():
        found[page_of(path)] += section(path)
    return found


@cache
def class_paths() -> list[str]:
    """All classes that a configuration names."""
    texts = [file.read_text() for file in sorted((ROOT / "configs").rglob("*.yaml"))]
    return sorted({path for text in texts for path in re.findall(r"class_path: ([\w.]+)", text)}, key=order)


def order(path: str) -> tuple[bool, bool, str]:
    """What most runs name comes first, and the miniature last."""
    return path.startswith("uae.miniature"), not path.startswith("uae.module"), path


def page_of(path: str) -> str:
    """The page of a class; the longest beginning decides.

    Raises:
        ValueError: No beginning fits.
    """
    fitting = [beginning for beginning in PAGE_OF if path.startswith(beginning)]
    if not fitting:
        raise ValueError(f"configs/ names {path}, which has no page of the configuration reference; add it to PAGE_OF in {__file__}")
    return PAGE_OF[max(fitting, key=len)]


def section(path: str) -> str:
    """Heading, summary and keys of a class, and then of the data classes that its keys may hold."""
    module, _, name = path.rpartition(".")
    made = getattr(import_module(module), name)
    text, waiting = heading(f"## {path}", made), [("", made)]
    for prefix, cls in waiting:  # grows while it is read
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, fail_untyped=False, sub_configs=True)
        actions = list(shown(parser))
        if cls is not made:
            text += heading(f"### {path.rpartition('.')[2]}: {prefix[:-1]}", cls)
        text += table(actions, prefix)
        waiting += [(f"{prefix}{action.dest}.", held) for action in actions for held in data_classes(type_of(action))]
    return text


def heading(line: str, cls: type) -> str:
    """A heading, and the first line of the docstring of a class."""
    return f"{line}\n\n{marked((cls.__doc__ or '').strip().splitlines()[0])}\n\n"


def data_classes(of: Any) -> Iterator[type]:
    """The data classes in an annotation that are no class path themselves."""
    if isinstance(of, type) and is_dataclass(of) and not any(path.endswith(f".{of.__name__}") for path in class_paths()):
        yield of
    for inner in get_args(of):
        yield from data_classes(inner)


def shown(parser: ArgumentParser) -> Iterator[Action]:
    """The options that hold a value."""
    for action in parser._actions:
        if action.default != SUPPRESS and action.dest not in ("help", "config"):
            yield action


def table(actions: list[Action], prefix: str = "") -> str:
    """A row per key."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for action in actions:
        default = "required" if action.required else code(plain(action.default))
        meaning = marked(first_sentence(action.help or ""))
        rows.append(f"| {code(prefix + action.dest)} | {code(type_name(type_of(action)))} | {default} | {meaning} |")
    return "\n".join(rows) + "\n\n" if actions else "It has no keys.\n\n"


def type_of(action: Action) -> Any:
    """The annotation of a key."""
    return getattr(action, "_typehint", None) or action.type or bool


def type_name(of: Any) -> str:
    """An annotation without the modules of its names."""
    text = of.__name__ if isinstance(of, type) and not get_args(of) else str(of)
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)
    return re.sub(r"Optional\[(.*)\]$", r"\1 | None", text).replace("NoneType", "None")


def plain(default: Any) -> str:
    """A default as a configuration has it."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    name = default.get("class_path") if hasattr(default, "get") else None
    return str(name or default)


def first_sentence(text: str) -> str:
    """The first sentence of a description, in one line."""
    return re.split(r"(?<=\.)(?<!e\.g\.)\s+(?=[A-Z`\"])", " ".join(text.split()), maxsplit=1)[0]


def marked(text: str) -> str:
    """Text for a cell: its code is marked, and nothing else of it means anything."""
    return re.sub(r"`+([^`]+)`+", r"<code>\1</code>", escaped(text))


def code(text: str) -> str:
    """Code for a cell."""
    return f"<code>{escaped(text)}</code>"


def escaped(text: str) -> str:
    """Text without characters that end a cell, or mean something to Markdown."""
    text = html.escape(text, quote=False)
    for character in "|*_[]$\\":
        text = text.replace(character, f"&#{ord(character)};")
    return text
