"""What every pretrained encoder shares: lazy loading, one copy per process, frozen weights, placement."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from uae.encoders.preprocessing import Preprocessing
from uae.locations import locate
from uae.placement import Placement, at_work, settle, torch_dtype
from uae.types import ImageEncoder

EXACT = Placement(dtype="float32")


class _Loaded:
    """A frozen module and its preprocessing; lives as long as one encoder uses it."""

    def __init__(self, module: nn.Module, preprocessing: Preprocessing, dtype: torch.dtype) -> None:
        self.module = module.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.dtype = dtype
        self.device: Any = "cpu"  # the policy's, as of the last load
        for weight in module.state_dict(keep_vars=True).values():  # computed buffers (rotary frequencies) stay exact
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)


_LOADED: WeakValueDictionary[Hashable, _Loaded] = WeakValueDictionary()


class Tower:
    """A frozen image tower.

    Deliberately not an ``nn.Module``: whoever holds one (a LightningModule, a metric) must neither train it, cast it to
    bf16, shard it nor save it. Encoders of equal weights and placement share one module in a process, so a reward and a
    metric that look through the same tower load it once; moving one moves the other. Copies and pickles carry no weights
    and find (or load) the shared module again on first use.

    Args:
        placement: dtype and device of the weights. float32 for published numbers. Half the memory moves a cosine of a
            random ViT-B/32 by 2e-5 (float16) or 5e-4 (bfloat16, where even identity is off by 5e-5 if the two sides come
            in batches of different size). float8 is refused.
    """

    _loaded: _Loaded | None = None

    def __init__(self, placement: Placement = EXACT) -> None:
        if placement.dtype == "float8":
            raise ValueError(
                "placement.dtype='float8' would change every score; allowed for an encoder: float32, bfloat16, float16; "
                "set the encoder's init_args.placement.dtype"
            )
        self.placement = placement

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
        """Load the weights (once per process) and move them to ``device``; returns itself. Idempotent.

        The placement's own device goes before ``device``; offloaded weights stay on the CPU until ``embed``.
        """
        with _ordinary_tensors():
            if self._loaded is None:
                key = self.weights(), self.placement
                loaded = _LOADED.get(key) or _Loaded(*self.read(), torch_dtype(self.placement))
                self._loaded = _LOADED.setdefault(key, loaded)
            settle([self._loaded.module], self.placement, device)
            self._loaded.device = device
        return self

    def embed(self, images_NCHW: Tensor) -> Tensor:
        """Embeddings float32 ``[N, D]``, not normalised, on the images' device wherever the tower works.

        Differentiable with respect to the images, never to the weights. Computed in the placement's dtype, whatever the
        surrounding autocast. Loads onto the images' device if ``load`` was not called.

        Args:
            images_NCHW: float ``[N, 3, H, W]``, RGB in [0, 1].

        Raises:
            ValueError: Not a float ``[N, 3, H, W]`` (8-bit images must be divided by 255 first); or a gradient is
                wanted from offloaded weights, which are gone when it is computed.
        """
        check_images(images_NCHW)
        if self._loaded is None:
            self.load(images_NCHW.device)
        loaded = self._loaded
        assert loaded is not None
        if self.placement.offload and images_NCHW.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "placement.offload=true moves an encoder away before the gradient of its embedding can be computed; "
                "set the encoder's init_args.placement.offload to false"
            )
        with at_work([loaded.module], self.placement, loaded.device) as device, torch.autocast(device.type, enabled=False):
            pixels_NCHW = loaded.preprocessing(images_NCHW.to(device))
            return self.features(loaded.module, pixels_NCHW.to(loaded.dtype)).to(images_NCHW.device, torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_loaded"}


def located(name: str, key: str) -> str:
    """Where the weights called ``name`` are; the error names the key of the encoder that says so."""
    try:
        return locate(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; set the encoder's init_args.{key}") from None


def check_images(images_NCHW: Tensor) -> None:
    """Refuse anything but float ``[N, 3, H, W]``."""
    if images_NCHW.ndim != 4 or images_NCHW.shape[1] != 3 or not images_NCHW.is_floating_point():
        raise ValueError(
            f"encoders take float images [N, 3, H, W] in [0, 1], got {images_NCHW.dtype} {list(images_NCHW.shape)}"
        )


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Make plain CPU weights, read in fp32, wherever the first use happens.

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
