"""An image model behind the images API of OpenAI, or of another server that speaks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from uae.bench.vendors.endpoint import Endpoint

OWN = {"model": "--model", "prompt": "--captions", "size": "--size"}  # parameters of the call that options of the command set
ONE_PICTURE = {"n": "a caption is drawn once", "stream": "replies are read whole"}
OPENAI_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ImageModel(Endpoint):
    """An image model.

    Args:
        usd_per_image: Price of one image in USD, its prompt included; 0 for a server of one's own.
        size: Size of the images, as "1024x1024"; None leaves it to the model.
        params: Further parameters of the call, passed on unchanged (quality, background, seed, ...).

    For all other settings see `Endpoint`.
    """

    usd_per_image: float
    size: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_price("usd_per_image")
        for key in self.params:
            if key in OWN:
                self.refuse("params", f"with {key!r}, which {OWN[key]} sets; leave it out")
            if key in ONE_PICTURE:
                self.refuse("params", f"with {key!r}, but {ONE_PICTURE[key]}; leave it out")

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that a picture depends on but its prompt."""
        return {"model": self.model, "base_url": self.base_url, "size": self.size, "params": dict(self.params)}

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise about an option of the command."""
        raise ValueError(f"--{key} is {why}")
