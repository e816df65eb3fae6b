"""Which networks take part in a run: how large they are, what of them trains, and where they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from uae.evaluation import AutoEncoder
from uae.metrics import UnifiedScore
from uae.rewards import WeightedReward
from uae.types import UMM

DEPTH = 4  # attributes of attributes that are searched for networks
LARGE = 1000  # members; larger lists and dictionaries are not searched
WITHOUT = ("builtins", "types", "torch.", "transformers.", "tokenizers.")  # objects of these that are no networks hold none
ADAPTER = "lora_"  # in the names of an adapter's weights, as PEFT gives them
NUMBERS = (2, 3)  # columns
say = rank_zero_only(partial(print, flush=True))


class Part(NamedTuple):
    """A row of the table."""

    name: str
    networks: str
    parameters: int
    trains: int
    dtype: str
    device: str


class Parts(ModelSummary):
    """Prints captioner, adapter, decoder, conditioner and encoders with their parameters, instead of Lightning's table of modules.

    Lightning sees only what trains, because frozen networks are no part of the module. The command line adds this unless
    ``trainer.callbacks`` has another summary or ``trainer.enable_model_summary`` is false. Modules that assemble no system, as
    those that pretrain, get Lightning's table.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what is loaded, in place of the bars of transformers, of which there is one per network."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        if isinstance(pl_module, AutoEncoder):
            say("loading the system and its encoders")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's table for other modules; the frozen networks of a system are not yet on their device here."""
        if not isinstance(pl_module, AutoEncoder):
            super().on_fit_start(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print, once everything is in its place."""
        self._tell(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print, where no validation has come before."""
        self._tell(pl_module)

    def _tell(self, module: LightningModule) -> None:
        if not self._told and isinstance(module, AutoEncoder):
            self._told = True
            say(table(parts_of(module.umm, module.reward, module.unified_score)))


def parts_of(umm: UMM, reward: WeightedReward | None = None, score: UnifiedScore | None = None) -> list[Part]:
    """The networks of a system, of its reward and of its metric. Weights that several parts use count in the first one.

    Args:
        umm: The system, prepared for training.
        reward: The reward, loaded; None has no rows.
        score: The metric of validations, loaded; None has no rows.
    """
    roles: dict[str, Any] = {"captioner": umm.captioner, "decoder": umm.renderer, "conditioner": umm.conditioner}
    roles |= {f"reward: {name}": part for name, part in (reward.parts if reward else {}).items()}
    roles |= {f"metric: {name}": encoder for name, encoder in (score.encoders if score else {}).items()}
    counted: set[int] = set()
    found = []
    for name, role in roles.items():
        networks = list(_networks(role, DEPTH, set()))
        weights = {id(p): (key, p) for network in networks for key, p in network.named_parameters()}
        if not weights:
            found.append(Part(name, "no network", 0, 0, "", ""))
            continue
        new = [one for key, one in weights.items() if key not in counted]
        counted |= weights.keys()
        adapter = [one for one in new if ADAPTER in one[0]]
        found.append(_part(name, networks, [one for one in new if ADAPTER not in one[0]]))
        if adapter:
            found.append(_part("  its adapter", [], adapter)._replace(networks="LoRA"))
    return found


def table(parts: Sequence[Part]) -> str:
    """The parts, one per line."""
    rows = [("part", "network", "parameters", "of these train", "dtype", "device"), *map(_cells, parts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(_aligned, range(len(widths)), row, widths)).rstrip() for row in rows)


def _cells(part: Part) -> tuple[str, ...]:
    trains = f"{part.trains:,}" if part.trains else "frozen" if part.parameters else ""
    return part.name, part.networks, f"{part.parameters:,}" if part.parameters else "", trains, part.dtype, part.device


def _aligned(column: int, cell: str, width: int) -> str:
    return cell.rjust(width) if column in NUMBERS else cell.ljust(width)


def _part(name: str, networks: Sequence[nn.Module], weights: Sequence[tuple[str, nn.Parameter]]) -> Part:
    kinds = dict.fromkeys(_kind(network) for network in networks)
    if not weights:
        return Part(name, f"{', '.join(kinds)} (counted above)", 0, 0, "", "")
    types = dict.fromkeys(str(p.dtype).removeprefix("torch.") for _, p in weights)
    places = dict.fromkeys(str(p.device) for _, p in weights)
    trains = sum(p.numel() for _, p in weights if p.requires_grad)
    return Part(name, ", ".join(kinds), sum(p.numel() for _, p in weights), trains, ", ".join(types), ", ".join(places))


def _kind(network: nn.Module) -> str:
    """The class of a network, seen through what is wrapped around it."""
    inner: Any = network
    while (held := getattr(inner, "model", None)) is not None and type(inner).__module__.startswith(("uae.", "peft.")):
        inner = held
    return type(inner).__name__


def _networks(holder: Any, depth: int, seen: set[int]) -> Iterator[nn.Module]:
    """The networks that an object holds in its attributes, or in lists and dictionaries there; not those it borrows by a function."""
    if id(holder) in seen or depth < 0:
        return
    seen.add(id(holder))
    if isinstance(holder, nn.Module):
        yield holder
        return
    for one in _held(holder):
        yield from _networks(one, depth - 1, seen)


def _held(holder: Any) -> list[Any]:
    """What may hold networks: members of lists and dictionaries, attributes of other objects."""
    if isinstance(holder, Mapping):
        return list(holder.values()) if len(holder) < LARGE else []  # vocabularies are larger
    if isinstance(holder, (list, tuple)):
        return list(holder) if len(holder) < LARGE else []
    return [] if type(holder).__module__.startswith(WITHOUT) else list(getattr(holder, "__dict__", {}).values())
