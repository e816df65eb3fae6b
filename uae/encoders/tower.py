"""What every pretrained encoder shares: lazy loading, one copy per process, frozen weights, placement."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from uae.encoders.preprocessing import Preprocessing
from uae.files.locations import locate
from uae.types import ImageEncoder
from uae.weights.placement import Placement, at_work, settle, torch_dtype

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
    feature: str = "projection"  # which of a tower's outputs is the embedding

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
        if self.placement.offload and images_NCHW.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "placement.offload=true moves an encoder away before the gradient of its embedding can be computed; "
                "set the encoder's init_args.placement.offload to false"
            )
        return self._embed(images_NCHW, self._ready().preprocessing)

    def prepare(self, image_3HW: Tensor) -> Tensor:
        """One 8-bit image uint8 ``[3, H, W]`` of any size as the tower's pixels float32 ``[3, h, w]``, on the CPU.

        Bit for bit what the official processor makes of it, rounding included; `embed` stays in float and is
        differentiable. Threads may call it at once, after ``load``.
        """
        return self._ready().preprocessing.of_bytes(image_3HW)

    def embed_prepared(self, pixels_NCHW: Tensor) -> Tensor:
        """Embeddings float32 ``[N, D]`` of what `prepare` made, stacked; otherwise as `embed`."""
        return self._embed(pixels_NCHW, None)

    def fingerprint(self) -> str:
        """sha256 of all that an embedding of prepared pixels depends on: weights, architecture, dtype, preprocessing.

        The same wherever the weights lie; reads them once, about a second per gigabyte.
        """
        loaded = self._ready()
        parts = [type(self).features.__qualname__, self.feature, repr(loaded.dtype), repr(loaded.preprocessing)]
        for name, module in loaded.module.named_modules():
            plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str)}
            plain.pop("name_or_path", None)  # where the weights lie
            parts += [name, type(module).__qualname__, repr(sorted(plain.items()))]
        digest = hashlib.sha256("\n".join(parts).encode())
        for name, weight in loaded.module.state_dict().items():
            digest.update(f"{name} {list(weight.shape)}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _ready(self) -> _Loaded:
        if self._loaded is None:
            self.load()
        assert self._loaded is not None
        return self._loaded

    def _embed(self, images_NCHW: Tensor, preprocessing: Preprocessing | None) -> Tensor:
        loaded = self._ready()
        with at_work([loaded.module], self.placement, loaded.device) as device, torch.autocast(device.type, enabled=False):
            pixels_NCHW = images_NCHW.to(device)
            pixels_NCHW = pixels_NCHW if preprocessing is None else preprocessing(pixels_NCHW)
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
