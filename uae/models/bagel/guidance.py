"""BAGEL's guidance: away from no text, away from no image, and then the length of the velocity is brought back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Renorm = Literal["global", "channel", "text_channel"]
KEY = "model.init_args.system.init_args.rendering"


@dataclass(frozen=True)
class Guidance:
    """How velocities under different contexts are combined. Part of the policy.

    With the velocity c under the whole context, u without text and i without images:

        g = u + text (c - u),    w = i + image (g - i),    v = w clamp(|c| / |w|, least, 1)

    With "text_channel", g is brought back to the length of c, and w is not. Without text guidance v is c. Lengths
    are of each image by itself; the official code takes one length for all images of a call.

    Args:
        text: Scale a of text guidance. 1 is none.
        image: Scale b of image guidance. 1 is none. Where a picture is drawn from text alone, i is c, and b only adds to a.
        renorm: Which length: "global" of an image's whole velocity, "channel" and "text_channel" of each token's.
        least: The smallest factor, from 0 to 1; 1 leaves lengths as they are.
    """

    text: float = 4.0
    image: float = 1.0
    renorm: Renorm = "global"
    least: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of its range.
        """
        for key, value in (("guidance", self.text), ("image_guidance", self.image)):
            if not value >= 1:
                raise ValueError(f"rendering.{key}={value}; allowed: 1 (none) or more; change {KEY}.{key}")
        if self.renorm not in get_args(Renorm):
            raise ValueError(f"rendering.renorm={self.renorm!r}; allowed: {', '.join(get_args(Renorm))}; change {KEY}.renorm")
        if not 0 <= self.least <= 1:
            raise ValueError(f"rendering.renorm_min={self.least}; allowed: 0 to 1; change {KEY}.renorm_min")

    def __call__(self, c_NLD: Tensor, u_NLD: Tensor, i_NLD: Tensor) -> Tensor:
        """The velocity ``[N, L, D]``, in float32, with the gradient of all of it."""
        if self.text <= 1:
            return c_NLD
        c, u, i = (_single(x) for x in (c_NLD, u_NLD, i_NLD))
        g = u + self.text * (c - u)
        if self.renorm == "text_channel":
            g = self._shortened(g, c, (2,))
            return i + self.image * (g - i)
        w = i + self.image * (g - i)
        return self._shortened(w, c, (1, 2) if self.renorm == "global" else (2,))

    def _shortened(self, w: Tensor, c: Tensor, over: tuple[int, ...]) -> Tensor:
        length_c, length_w = (torch.linalg.vector_norm(x, dim=over, keepdim=True) for x in (c, w))
        return w * (length_c / (length_w + 1e-8)).clamp(self.least, 1.0)


def _single(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
