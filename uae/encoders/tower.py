"""What every pretrained encoder shares: lazy loading, one copy per process, frozen fp32 compute."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from uae.encoders.preprocessing import Preprocessing
from uae.types import ImageEncoder


class _Loaded:
    """A frozen module and its preprocessing; lives as long as one encoder uses it."""

    def __init__(self, module: nn.Module, preprocessing: Preprocessing) -> None:
        self.module = module.float().eval().requires_grad_(False)
        self.preprocessing = preprocessing


_LOADED: WeakValueDictionary[Hashable, _Loaded] = WeakValueDictionary()


class Tower:
    """A frozen image tower.

    Deliberately not an ``nn.Module``: whoever holds one (a LightningModule, a metric) must neither train it, cast it to
    bf16, shard it nor save it. Encoders with equal weights share one module in a process, so a reward and a metric that
    look through the same tower load it once; moving one moves the other. Copies and pickles carry no weights and
    find (or load) the shared module again on first use.
    """

    _loaded: _Loaded | None = None

    def weights(self) -> Hashable:
        """What identifies the weights; equal values share one module."""
        raise NotImplementedError

    def read(self) -> tuple[nn.Module, Preprocessing]:
        """Read the weights from disk (or hub) onto the CPU."""
        raise NotImplementedError

    def features(self, module: nn.Module, pixels_NCHW: Tensor) -> Tensor:
        """The embedding ``[N, D]`` of preprocessed pixels."""
        raise NotImplementedError

    def load(self, device: Any = "cpu") -> ImageEncoder:
        """Load the weights (once per process) and move them to ``device``; returns itself. Idempotent."""
        with _ordinary_tensors():
            if self._loaded is None:
                loaded = _LOADED.get(self.weights()) or _Loaded(*self.read())
                self._loaded = _LOADED.setdefault(self.weights(), loaded)
            self._loaded.module.to(device)
        return self

    def embed(self, images_NCHW: Tensor) -> Tensor:
        """Embeddings float32 ``[N, D]``, not normalised.

        Differentiable with respect to the images, never to the weights. fp32 whatever the surrounding autocast. Loads
        onto the images' device if ``load`` was not called.

        Args:
            images_NCHW: float ``[N, 3, H, W]``, RGB in [0, 1].

        Raises:
            ValueError: Not a float ``[N, 3, H, W]`` (8-bit images must be divided by 255 first).
        """
        check_images(images_NCHW)
        if self._loaded is None:
            self.load(images_NCHW.device)
        assert self._loaded is not None
        module = self._loaded.module
        device = next(module.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.features(module, self._loaded.preprocessing(images_NCHW.to(device))).float()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_loaded"}


def check_images(images_NCHW: Tensor) -> None:
    """Refuse anything but float ``[N, 3, H, W]``."""
    if images_NCHW.ndim != 4 or images_NCHW.shape[1] != 3 or not images_NCHW.is_floating_point():
        raise ValueError(
            f"encoders take float images [N, 3, H, W] in [0, 1], got {images_NCHW.dtype} {list(images_NCHW.shape)}"
        )


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Make plain fp32 CPU weights wherever the first use happens.

    Validation runs in inference mode, whose tensors could never enter a later backward pass; Lightning's
    ``configure_model`` may have set a meta device or a bf16 default. The random state is restored, so that sharing a
    tower or not changes no sampled caption.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(default)
