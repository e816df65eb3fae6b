"""The settings by which runs differ, from the ``config.yaml`` of a run, under short names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Value = str | int | float | bool
MODEL = "model.init_args"
SHOWN = {  # the short name of a setting, and its key
    "system": f"{MODEL}.system.class_path",
    "train": f"{MODEL}.train",
    "lr": f"{MODEL}.optimizer.init_args.lr",
    "optimizer": f"{MODEL}.optimizer.class_path",
    "group": f"{MODEL}.group",
    "batch_size": "data.init_args.batch_size",
    "mini_batches": f"{MODEL}.mini_batches",
    "num_iterations": f"{MODEL}.num_iterations",
    "accumulate": "trainer.accumulate_grad_batches",
    "max_steps": "trainer.max_steps",
    "loss": f"{MODEL}.loss.class_path",
    "aggregation": f"{MODEL}.loss.init_args.aggregation",
    "beta": f"{MODEL}.loss.init_args.beta",
    "epsilon_low": f"{MODEL}.loss.init_args.epsilon_low",
    "epsilon_high": f"{MODEL}.loss.init_args.epsilon_high",
    "advantage_scale": f"{MODEL}.advantage_scale",
    "advantage_order": f"{MODEL}.advantage_order",
    "temperature": f"{MODEL}.sampling.temperature",
    "max_tokens": f"{MODEL}.sampling.max_tokens",
    "reconstructions": f"{MODEL}.reconstructions",
    "finetune": f"{MODEL}.finetune.class_path",
    "rank": f"{MODEL}.finetune.init_args.rank",
    "image_finetune": f"{MODEL}.image_finetune.class_path",
    "image_lr": f"{MODEL}.image_lr",
    "precision": "trainer.precision",
    "devices": "trainer.devices",
    "num_nodes": "trainer.num_nodes",
    "strategy": "trainer.strategy",
    "seed": "seed_everything",
}
HPARAMS_FIRST = ("beta", "finetune", "group", "loss", "lr")  # of the settings, those that TensorBoard shows first
WEIGHTS = f"{MODEL}.reward.init_args.weights"
CONFIG = "config.yaml"


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run has saved in its folder; empty if there is none."""
    file = folder / CONFIG
    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found if isinstance(found, dict) else {}


def key_settings(config: Mapping[str, Any]) -> dict[str, Value]:
    """The settings by which runs differ most: `SHOWN` and the weights of the reward. Those that are not set are left out."""
    found = {name: _at(config, key) for name, key in SHOWN.items()}
    weights = _at(config, WEIGHTS)
    if isinstance(weights, Mapping):
        found |= {f"reward_{part}": weight for part, weight in weights.items()}
    return {name: _short(value) for name, value in found.items() if value is not None}


def arguments_of(config: Mapping[str, Any], class_path: str) -> dict[str, Any]:
    """The arguments of the first callback of a class; empty if the run has none."""
    for callback in _at(config, "trainer.callbacks") or ():
        if isinstance(callback, Mapping) and callback.get("class_path") == class_path:
            return dict(callback.get("init_args") or {})
    return {}


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key. ``init_args`` may be missing in the file: a class without ``class_path`` has its arguments bare."""
    node: Any = config
    for name in key.split("."):
        if not isinstance(node, Mapping) or (name not in node and name != "init_args"):
            return None
        node = node.get(name, node if name == "init_args" else None)
    return node


def _short(value: Any) -> Value:
    """A value in a table: of a class, its name without the package."""
    if isinstance(value, Mapping):
        value = value.get("class_path", ", ".join(map(str, _leaves(value))))
    if isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split(".")):
        return value.rpartition(".")[2]
    return value if isinstance(value, Value) else str(value)


def _leaves(node: Any) -> Iterator[Any]:
    for value in node.values() if isinstance(node, Mapping) else [node]:
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield value
