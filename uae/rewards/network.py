"""The base class of rewards that ask a frozen network, and how a model of transformers is read for them."""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from uae.encoders.tower import EXACT, ordinary_tensors
from uae.files.locations import locate
from uae.rewards.base import BaseReward, batch_and_group
from uae.weights.placement import Placement, at_work, frozen, settle, torch_dtype
from uae.weights.remote_code import refused


@dataclass(eq=False)
class Loaded:
    """A frozen network and what turns images and texts into its inputs (a processor, a tokenizer; None if nothing does)."""

    network: nn.Module
    processor: Any = None


_LOADED: WeakValueDictionary[Hashable, Loaded] = WeakValueDictionary()  # an entry lives as long as a reward uses it


class NetworkReward(BaseReward):
    """A reward that a frozen network computes, one number per row.

    Like `uae.encoders.tower.Tower` it is no ``nn.Module``, so that nothing trains, casts, shards or saves the network.
    Rewards of one class with equal weights and placement share the network. Copies and pickles contain no weights.

    Args:
        placement: Data type and device of the weights. In another type than float32 a score depends a little on the rows
            beside it.
        rows: Most images that the network gets at once.

    Raises:
        ValueError: The data type is float8.
    """

    _loaded: Loaded | None = None
    _device: torch.device | str = "cpu"  # what `load` was given last: where the policy is

    def __init__(self, placement: Placement = EXACT, rows: PositiveInt = 16) -> None:
        if placement.dtype == "float8":
            raise ValueError(
                "placement.dtype='float8' would change every score; allowed: float32, bfloat16, float16; "
                "set the reward's init_args.placement.dtype"
            )
        self.placement, self.rows = placement, rows

    @abstractmethod
    def weights(self) -> Hashable:
        """A value that identifies the weights: rewards for which it is equal share one network."""

    @abstractmethod
    def read(self) -> Loaded:
        """Read the network from the disk or the hub onto the CPU.

        Raises:
            ValueError: The weights cannot be read, or some are missing. The message names the key to change.
        """

    @abstractmethod
    def scores(self, loaded: Loaded, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Scores ``[N]`` of float32 images, which are on the network's device. No gradient is kept.

        What a row with pixels that are not finite gets is replaced by NaN afterwards.
        """

    def load(self, device: torch.device | str = "cpu") -> NetworkReward:
        """Load the network, once per process, and move it to ``device``; returns the reward itself.

        Args:
            device: Where the weights go, unless the placement names a device of its own. Offloaded weights stay on the CPU
                until they are needed.
        """
        with ordinary_tensors():
            if self._loaded is None:
                key = type(self), self.weights(), self.placement
                self._loaded = _LOADED.get(key) or self._frozen()
                _LOADED[key] = self._loaded
            settle([self._loaded.network], self.placement, device)
        self._device = device
        return self

    @torch.no_grad()
    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Rewards float32 ``[B, G]``; NaN where the source or the reconstruction has a pixel that is no finite number.

        If `load` was not called before, the weights are loaded onto the device of the reconstructions.
        """
        batch, group = batch_and_group(sources_BCHW, reconstructions_NCHW, texts)
        if self._loaded is None:
            self.load(reconstructions_NCHW.device)
        assert self._loaded is not None
        whole_N = _finite(reconstructions_NCHW) & _finite(sources_BCHW).repeat_interleave(group).to(reconstructions_NCHW.device)
        with at_work([self._loaded.network], self.placement, self._device) as device, torch.autocast(device.type, enabled=False):
            sources, redrawn = (images.to(device, torch.float32) for images in (sources_BCHW, reconstructions_NCHW))
            scores_N = self.scores(self._loaded, sources, redrawn, texts).to(reconstructions_NCHW.device, torch.float32)
        return scores_N.masked_fill(~whole_N, torch.nan).view(batch, group)

    def batches(self, count: int) -> Iterator[range]:
        """The rows 0 to ``count`` in batches of at most ``rows``."""
        return (range(start, min(start + self.rows, count)) for start in range(0, count, self.rows))

    def _frozen(self) -> Loaded:
        loaded = self.read()
        frozen(loaded.network, torch_dtype(self.placement))
        return loaded

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_loaded"}


def pretrained(kind: Any, name: str, key: str, placement: Placement, unused: str = "$^") -> Loaded:
    """Read a model of transformers and its processor, entirely or not at all.

    Args:
        kind: The class of the model, with a ``from_pretrained`` of transformers.
        name: Folder or hub name of the checkpoint, see `uae.files.locations.locate`.
        key: The argument of the reward that holds the name, for errors.
        placement: Says the data type of the weights.
        unused: Regular expression of the beginnings of names of weights that nothing reads, so that they may be missing.

    Raises:
        ValueError: There is no such model, weights are missing or have other shapes, or it needs code of its own.
    """
    import transformers
    from safetensors import SafetensorError

    processors: Any = transformers.AutoProcessor  # its methods have no types
    with refused(name):
        try:
            path = locate(name)
            options: dict[str, Any] = {"local_files_only": os.path.isdir(path), "trust_remote_code": False}
            processor = processors.from_pretrained(path, **options)
            network, report = kind.from_pretrained(
                path, dtype=torch_dtype(placement), ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise ValueError(
                f"{key} {name!r} cannot be read as a model of transformers with its processor "
                f"({' '.join(str(error).split())[:200]}); set the reward's init_args.{key}"
            ) from error
    names = {*report["missing_keys"], *(mismatch[0] for mismatch in report["mismatched_keys"])}
    absent = sorted(weight for weight in names if not re.match(unused, weight))
    if absent:
        raise ValueError(
            f"{key} {name!r} lacks {len(absent)} weights of its config ({absent[0]}, ...), or has them in other shapes; "
            f"set the reward's init_args.{key} to a complete checkpoint"
        )
    return Loaded(network, processor)


def identity(name: str) -> str:
    """What identifies the weights of a name: the folder or file on this disk, or else the name on the hub.

    A name that leads nowhere identifies itself; reading it says so.
    """
    try:
        place = locate(name)
    except FileNotFoundError:
        return name
    return os.path.realpath(place) if os.path.exists(place) else place


def as_bytes(images_NCHW: Tensor) -> list[Tensor]:
    """Images ``[3, H, W]`` in 8 bits on the CPU, as processors of transformers take them."""
    return list((images_NCHW.clamp(0, 1) * 255).round().to(torch.uint8).cpu())


def asked(loaded: Loaded, content: list[dict[str, str]], images: list[list[Tensor]], device: torch.device) -> Any:
    """One question about every list of images as the inputs of a vision-language model, ready to answer.

    Args:
        loaded: The model and its processor, which has a chat template.
        content: The parts of the user's turn in the format of chat templates; the images of a row stand where it says image.
        images: 8-bit images ``[3, H, W]`` of every row.
        device: Where the inputs go.
    """
    turn = [{"role": "user", "content": content}]
    prompt = loaded.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = loaded.processor(text=[prompt] * len(images), images=images, padding=True, padding_side="left", return_tensors="pt")
    return inputs.to(device, loaded.network.dtype)


def _finite(images_NCHW: Tensor) -> Tensor:
    """Whether all pixels of an image are finite, bool ``[N]``."""
    return images_NCHW.isfinite().flatten(1).all(dim=1)
