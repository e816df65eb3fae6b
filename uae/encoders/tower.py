"""The base class of pretrained image encoders: frozen weights that are loaded late, and once per process."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from uae.encoders.preprocessing import Preprocessing
from uae.files.locations import locate
from uae.types import ImageEncoder
from uae.weights.placement import Placement, at_work, frozen, settle, torch_dtype

EXACT = Placement(dtype="float32")


class _Loaded:
    """A frozen module and its preprocessing, which encoders of the same weights share."""

    def __init__(self, module: nn.Module, preprocessing: Preprocessing, dtype: torch.dtype) -> None:
        self.module = frozen(module, dtype)
        self.preprocessing = preprocessing
        self.dtype = dtype
        self.device: torch.device | str = "cpu"  # what `Tower.load` was given last: where the policy is


_LOADED: WeakValueDictionary[Hashable, _Loaded] = WeakValueDictionary()  # an entry lives as long as an encoder uses it


class Tower(ABC):
    """A frozen image tower, an `uae.types.ImageEncoder`.

    It is no ``nn.Module`` on purpose: a LightningModule or a metric that holds one must not train it, cast it, shard it or
    save it. Encoders with equal weights and placement share one module in a process, so a reward and a metric that use the
    same tower load it once, and moving one encoder moves the other. Copies and pickles contain no weights; they find the
    shared module, or load it, when they are first used.

    Args:
        placement: Data type and device of the weights. Published numbers need float32. The other types halve the memory
            and change a cosine (of a random ViT-B/32) by about 2e-5 for float16 and 5e-4 for bfloat16; in bfloat16 the
            cosine of equal images in batches of different sizes is off by 5e-5, too.

    Raises:
        ValueError: The data type is float8.
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

    @abstractmethod
    def weights(self) -> Hashable:
        """A value that identifies the weights: encoders for which it is equal share one module."""

    @abstractmethod
    def read(self) -> tuple[nn.Module, Preprocessing]:
        """Read the weights from the disk or the hub onto the CPU."""

    @abstractmethod
    def features(self, module: nn.Module, pixels_NCHW: Tensor) -> Tensor:
        """The embedding ``[N, D]`` of preprocessed pixels ``[N, 3, h, w]``."""

    # jsonargparse takes a class for an ImageEncoder only if its methods are annotated exactly as those of the protocol.
    def load(self, device: torch.device | str = "cpu") -> ImageEncoder:
        """Load the weights, once per process, and move them to a device; returns the encoder itself.

        Calling it again moves the weights only.

        Args:
            device: Where the weights go, unless the placement names a device of its own. Offloaded weights stay on the CPU
                until `embed` needs them.
        """
        with ordinary_tensors():
            if self._loaded is None:
                key = self.weights(), self.placement
                loaded = _LOADED.get(key) or _Loaded(*self.read(), torch_dtype(self.placement))
                self._loaded = _LOADED.setdefault(key, loaded)
            settle([self._loaded.module], self.placement, device)
            self._loaded.device = device
        return self

    def embed(self, images_NCHW: Tensor) -> Tensor:
        """Embed images, with a gradient with respect to the images but never to the weights.

        Computed in the data type of the placement, whatever the surrounding autocast. If `load` was not called before, the
        weights are loaded onto the device of the images.

        Args:
            images_NCHW: Float ``[N, 3, H, W]``, RGB in [0, 1].

        Returns:
            Embeddings float32 ``[N, D]``, not normalised, on the device of the images.

        Raises:
            ValueError: The images are not float ``[N, 3, H, W]`` (divide 8-bit images by 255 first), or a gradient is
                asked for while the weights are offloaded: they have left the device when it is computed.
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
        """Turn one uint8 image ``[3, H, W]`` of any size into the pixels float32 ``[3, h, w]`` of the tower, on the CPU.

        The result equals that of the official image processor bit for bit, rounding to 8 bits included, which `embed`
        leaves out. Several threads may call it at the same time, once the weights are loaded. Subclasses leave it as it is: towers
        with equal `preprocessing` share its results.
        """
        return self.preprocessing.of_bytes(image_3HW)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the pixels of the tower."""
        return self._ready().preprocessing

    def embed_prepared(self, pixels_NCHW: Tensor) -> Tensor:
        """Embed stacked results ``[N, 3, h, w]`` of `prepare` as float32 ``[N, D]``; otherwise the same as `embed`."""
        return self._embed(pixels_NCHW, None)

    def fingerprint(self) -> str:
        """SHA-256 of everything that an embedding depends on: weights, architecture, data type and preprocessing.

        It does not depend on where the weights are stored. All of them are read, which takes about a second per gigabyte.
        """
        loaded = self._ready()
        parts = [type(self).features.__qualname__, self.feature, repr(loaded.dtype), repr(loaded.preprocessing)]
        for name, module in loaded.module.named_modules():
            plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str)}
            plain.pop("name_or_path", None)  # where the weights are stored
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

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_loaded"}


def located(name: str, key: str) -> str:
    """Where a checkpoint is, see `uae.files.locations.locate`.

    Args:
        name: The name of the checkpoint in the configuration.
        key: The argument of the encoder that holds the name, for the error.

    Raises:
        FileNotFoundError: ``name`` is written like a path, and nothing is there.
    """
    try:
        return locate(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; set the encoder's init_args.{key}") from None


def check_images(images_NCHW: Tensor) -> None:
    """Check that images are a float tensor ``[N, 3, H, W]``; their values are not looked at.

    Raises:
        ValueError: They are not.
    """
    if images_NCHW.ndim != 4 or images_NCHW.shape[1] != 3 or not images_NCHW.is_floating_point():
        raise ValueError(f"encoders take float images [N, 3, H, W] in [0, 1], got {images_NCHW.dtype} {list(images_NCHW.shape)}")


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Inside, new weights are ordinary float32 tensors on the CPU, whatever surrounds the first use of a network.

    Validation runs in inference mode, whose tensors could never enter a later backward pass. Lightning's
    ``configure_model`` may have set a meta device or a default of bfloat16. The random state is restored, so that captions
    do not depend on whether a network had been loaded before.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(default)
