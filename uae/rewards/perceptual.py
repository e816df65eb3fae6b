"""Perceptual distances: how different two pictures look, place by place, in the features of a trained network."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from uae.encoders.tower import EXACT
from uae.files.locations import local_file
from uae.rewards.network import Loaded, NetworkReward, identity
from uae.weights.placement import Placement
from uae.weights.state import load_into, read_state

KEY = "the reward's init_args.backbone"
# torchvision's "features.3.weight" is "net.slice2.3.weight" in LPIPS, "net.slices.1.3.weight" in that of SqueezeNet, "stage2.3.weight"
# in DISTS, whose pooling filters are its own
BACKBONE = re.compile(r"(?:net\.)?(?:slice\d|slices\.\d|stage\d)\.(\d+\.(?:\w+\.)?(?:weight|bias))")
SMALLEST = 64  # pixels; the poolings of the backbones leave nothing of much less


class PerceptualSimilarity(NetworkReward):
    """Minus the LPIPS (arXiv 1801.03924) or DISTS (arXiv 2004.07728) distance of source and reconstruction.

    Both see colour, texture and small shapes at their places, to which the cosine of a whole image is nearly blind. LPIPS
    punishes every shift by a few pixels; DISTS forgives other instances of a texture. Neither knows what is in the picture.
    The networks, and the weights that they put on the features of the backbone, are those of torchmetrics; the backbone's
    own weights come from a file, so that nothing is downloaded behind the back of a run.

    Args:
        distance: "lpips_alex", "lpips_squeeze", "lpips_vgg" or "dists".
        backbone: File of torchvision's ImageNet weights of AlexNet, SqueezeNet 1.1 or VGG16 ("lpips_vgg", "dists"), e.g.
            ``alexnet-owt-7be5be79.pth``, ``squeezenet1_1-b8a52dc0.pth``, ``vgg16-397923af.pth``. Its classifier is not read.
        side: Both images are resized to ``side x side`` pixels (bilinear, antialiased); at least 64.
        placement: See `NetworkReward`. The data type must be float32: squares of small features vanish in 16 bits.
        rows: See `NetworkReward`.

    Raises:
        ValueError: ``distance`` is unknown, ``side`` is below 64, or the data type is not float32.
    """

    def __init__(
        self, distance: Literal["lpips_alex", "lpips_squeeze", "lpips_vgg", "dists"], backbone: str, side: PositiveInt = 256,
        placement: Placement = EXACT, rows: PositiveInt = 16,
    ) -> None:  # fmt: skip
        super().__init__(placement, rows)
        if distance not in ("lpips_alex", "lpips_squeeze", "lpips_vgg", "dists"):
            raise ValueError(
                f"distance={distance!r}; allowed: lpips_alex, lpips_squeeze, lpips_vgg, dists; set the reward's init_args.distance"
            )
        if side < SMALLEST:
            raise ValueError(f"side={side}; allowed: {SMALLEST} or more; set the reward's init_args.side")
        if placement.dtype != "float32":
            raise ValueError(
                f"placement.dtype={placement.dtype!r} loses small distances; allowed: float32; set the reward's "
                "init_args.placement.dtype"
            )
        self.distance, self.backbone, self.side = distance, backbone, side

    def weights(self) -> Hashable:
        """The kind of distance and the file of the backbone."""
        return self.distance, identity(self.backbone)

    def read(self) -> Loaded:
        """Build the network of torchmetrics and put the backbone's weights into it."""
        state = read_state(local_file(self.backbone, KEY))
        network = _dists() if self.distance == "dists" else _lpips(self.distance)
        wanted = network.state_dict()
        names = {key: f"features.{match[1]}" for key in wanted if (match := BACKBONE.fullmatch(key))}
        found = {key: state[name] for key, name in names.items() if name in state}
        own = {key: value for key, value in wanted.items() if key not in names}  # what torchmetrics has itself
        load_into(network, own | found, f"backbone {self.backbone!r}", KEY)
        return Loaded(network)

    def scores(self, loaded: Loaded, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Minus the distances ``[N]``: 0 for equal images, and below it for others."""
        network: Any = loaded.network
        group = len(reconstructions_NCHW) // len(sources_BCHW)
        sources_BCHW = self._resized(sources_BCHW)
        distances = []
        for some in self.batches(len(reconstructions_NCHW)):
            sources_NCHW = sources_BCHW[torch.tensor(list(some), device=sources_BCHW.device) // group]
            redrawn_NCHW = self._resized(reconstructions_NCHW[some.start : some.stop])
            if self.distance == "dists":
                distance_N = network(sources_NCHW, redrawn_NCHW, require_grad=True)  # False is only another grad mode
            else:
                distance_N = network(sources_NCHW, redrawn_NCHW, normalize=True)
            distances.append(distance_N.reshape(-1))
        return -torch.cat(distances)

    def _resized(self, images_NCHW: Tensor) -> Tensor:
        size = (self.side, self.side)
        if tuple(images_NCHW.shape[-2:]) == size:
            return images_NCHW
        return F.interpolate(images_NCHW, size, mode="bilinear", align_corners=False, antialias=True)


def _lpips(distance: str) -> nn.Module:
    """LPIPS with its own trained weights, which torchmetrics has, and a random backbone."""
    from torchmetrics.functional.image import lpips

    kind: Any = lpips._LPIPS  # the function that torchmetrics exports downloads the backbone in every call
    network: nn.Module = kind(net=distance.removeprefix("lpips_"), pnet_rand=True)
    return network


def _dists() -> nn.Module:
    """DISTS with its own trained weights, which torchmetrics has, and a random backbone.

    Its constructor always downloads the backbone's weights, which only replacing the function that does it can prevent.
    """
    import torchvision
    from torchmetrics.functional.image import dists

    with mock.patch.object(dists, "vgg16", return_value=torchvision.models.vgg16(init_weights=False)):
        return dists.DISTSNetwork()
