"""What learns: a network, where it started, and how to go back there.

A captioner has a learner, and so has a renderer that trains. Where one network captions and draws, both have the same
learner. Finetuning, sharding, export and the KL term need to know nothing else of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

Half = Literal["captions", "images"]
M = TypeVar("M", bound=nn.Module)
DROPOUTS = ("p", "dropout", "attention_dropout")  # nn.Dropout's name for its probability, and those of attention layers


def switch_dropout_off(model: M) -> M:
    """Set every probability of dropout in a model to 0, in place."""
    for module in model.modules():
        for name in DROPOUTS:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return model


class Recomputable(nn.Module):
    """A layer that may be computed again in the backward pass, as transformers' own layers may."""


class Kept(nn.Module):
    """Weights of a checkpoint, as buffers, that no pass uses: an adapter must leave their names alone."""


class Network(nn.Module):
    """The root of what learns: a model of transformers or diffusers, a PeftModel around one, or a module of one's own.

    It is what a distributed strategy shards and what a checkpoint names, so everything that needs the model's own
    parameters happens inside its ``forward``. Dropout is switched off: with it, the policy ratio would not be one.

    Args:
        model: A model of transformers or diffusers, a PeftModel around one, or a module of one's own.
    """

    used_only_for: Mapping[Half, str] = MappingProxyType({})
    """Regular expressions over parameter names: what captions alone use, and what images alone use."""

    gradient_checkpointing: bool
    """Whether passes with gradient keep the inputs of blocks only and compute the rest again. Changes no number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = switch_dropout_off(model)

    @property
    def base(self) -> Any:
        """The library's own model, whether or not an adapter wraps it."""
        model: Any = self.model
        return model.get_base_model() if self.adapted else model

    @property
    def adapted(self) -> bool:
        """Whether an adapter wraps the model."""
        return hasattr(self.model, "peft_config")

    def never_adapted(self) -> list[nn.Module]:
        """Modules whose weights are read directly, so that an adapter on them would have no effect."""
        return []


N = TypeVar("N", bound=Network, covariant=True)


@dataclass(frozen=True)
class FrozenCopy(Generic[N]):
    """The start is a second network, which is never trained."""

    network: N


@dataclass(frozen=True)
class WithoutAdapter:
    """The start is the network with its adapter switched off."""


@dataclass(frozen=True)
class FrozenAdapter:
    """The start is the network with another adapter, which is never trained.

    Args:
        name: Name of that adapter in the PeftModel.
    """

    name: str


def _nowhere(_: Network) -> None:
    """Nobody else holds the network."""


class Learner(Generic[N]):
    """A network that learns, and where it started. `uae.models.finetune` decides what of it trains.

    Args:
        network: The network, with the weights it starts from.
        install: Called with the network that shall compute from now on, wherever somebody else holds it, too (a diffusers
            pipeline holds its denoiser).
    """

    def __init__(self, network: N, install: Callable[[N], None] = _nowhere) -> None:
        self.network = network  # inside `reference`, the one that computes like the start
        self.start: FrozenCopy[N] | WithoutAdapter | FrozenAdapter | None = None  # None: the start was not kept
        self._install = install

    def roots(self) -> list[N]:
        """The networks that a strategy shards: the one that learns, and the frozen copy of its start, if there is one."""
        return [self.network, *([self.start.network] if isinstance(self.start, FrozenCopy) else [])]

    def to(self, device: torch.device | str) -> None:
        """Move the network and the frozen copy of its start, if there is one."""
        for root in self.roots():
            root.to(device)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, ``network`` computes with the weights it started from.

        Raises:
            RuntimeError: The start was not kept.
        """
        if self.start is None:
            raise RuntimeError(
                "the weights that the run started from were not kept: attach the finetuning with keep_reference=True, as a "
                "run does where model.init_args.loss.beta is above 0"
            )
        with self._swapped() if isinstance(self.start, FrozenCopy) else _switched(self.network.model, self.start):
            yield

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        live, (_, start) = self.network, self.roots()
        try:
            self.network = start
            self._install(start)
            yield
        finally:
            self.network = live
            self._install(live)


@contextmanager
def _switched(model: Any, start: WithoutAdapter | FrozenAdapter) -> Iterator[None]:
    """Inside, a PeftModel works with another adapter than "default", or with none."""
    trains = [parameter.requires_grad for parameter in model.parameters()]
    try:
        if isinstance(start, FrozenAdapter):
            model.set_adapter(start.name)
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        if isinstance(start, FrozenAdapter):
            model.set_adapter("default")
        for parameter, trained in zip(model.parameters(), trains, strict=True):  # PEFT switches these as well
            parameter.requires_grad_(trained)
