"""Calls of an image model over the network: a prompt becomes a picture, a refusal, or a failure."""

from __future__ import annotations

import asyncio
import base64
import re
from http.client import HTTPException
from typing import Any, NamedTuple, Protocol
from urllib.parse import urljoin, urlsplit
from urllib.request import urlopen

from PIL import Image

from uae.bench.drawing.image_model import ImageModel
from uae.bench.vendors.clients import Failure, VendorClient
from uae.files.pictures import MAX_FILE_BYTES, UnreadableImageError, read_picture

REFUSING = (400, 403, 422)
REFUSAL_CODES = ("moderation_blocked", "content_policy_violation", "content_filter", "contentFilter")
REFUSAL = re.compile(
    r"content[ _]?(policy|filter|moderation)|safety (system|policy|filter)|usage polic|responsible ?ai|\bflagged\b", re.IGNORECASE
)
FETCHES = 3  # tries to fetch a picture that is paid already


class Received(NamedTuple):
    """A picture.

    Args:
        picture: The picture in 8-bit RGB, of any size.
        revised_prompt: The prompt that the model made of the one it was given; None if it does not say.
    """

    picture: Image.Image
    revised_prompt: str | None


class Refused(NamedTuple):
    """A prompt that the vendor does not draw.

    Args:
        message: Reason, in one line.
    """

    message: str


class DrawingClient(Protocol):
    """What a run needs of an image model's client."""

    async def draw(self, prompt: str) -> Received | Refused | Failure:
        """Make one call, see `ImageClient.draw`."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class ImageClient(VendorClient):
    """Client of one image model.

    Args:
        model: The image model.
    """

    def __init__(self, model: ImageModel) -> None:
        super().__init__(model)
        self.model = model

    async def draw(self, prompt: str) -> Received | Refused | Failure:
        """Draw one picture of a prompt."""

        async def call() -> Received | Refused | Failure:
            size = {} if self.model.size is None else {"size": self.model.size}
            # Other servers have parameters that the library does not know, so they are put into the body as they are.
            reply = await self.api.images.generate(model=self.model.model, prompt=prompt, extra_body=dict(self.model.params), **size)
            return await self._picture(reply)

        came = await self.guarded(call, _paid_for_nothing)
        return Refused(came.message) if isinstance(came, Failure) and _refuses(came) else came

    async def _picture(self, reply: Any) -> Received | Failure:
        """The picture of a reply whose form is not certain: any server may stand behind ``base_url``."""
        try:
            first = reply.data[0]
            letters, address = getattr(first, "b64_json", None), getattr(first, "url", None)
        except (AttributeError, IndexError, TypeError):
            letters = address = None
        try:
            if isinstance(letters, str) and letters:
                content = base64.b64decode(letters.rpartition(",")[2])  # some servers write data:image/png;base64, before it
            elif isinstance(address, str) and address.startswith("data:"):
                content = base64.b64decode(address.rpartition(",")[2])
            elif isinstance(address, str) and address:
                content = await self._fetch(address)
            else:
                return _paid_for_nothing(self.line(f"no picture in the reply {str(reply)[:200]}"))
            picture = read_picture(content)
        except (UnreadableImageError, OSError, HTTPException, ValueError) as error:
            return _paid_for_nothing(self.line(f"the picture of the reply cannot be read ({type(error).__name__}: {error})"))
        revised = getattr(first, "revised_prompt", None)
        return Received(picture, self.hidden(revised) if isinstance(revised, str) else None)

    async def _fetch(self, address: str) -> bytes:
        """The content behind the address of a picture, which gets no key. It may be relative to the address of the API."""
        whole = urljoin(str(self.api.base_url), address)
        if urlsplit(whole).scheme not in ("http", "https"):
            raise ValueError("its address is not http(s)")
        for attempt in range(FETCHES):
            try:
                return await asyncio.to_thread(_content, whole, self.model.timeout)
            except (OSError, HTTPException):
                if attempt == FETCHES - 1:
                    raise
                await asyncio.sleep(self.model.first_pause * 2**attempt)
        raise AssertionError


def _content(address: str, timeout: float) -> bytes:
    with urlopen(address, timeout=timeout) as reply:
        content: bytes = reply.read(MAX_FILE_BYTES + 1)
    return content


def _paid_for_nothing(text: str) -> Failure:
    return Failure(text, None, again=False, paid=True, pause=None)


def _refuses(came: Failure) -> bool:
    """Whether the vendor refuses the prompt for what it says; other errors of the same status are mistakes of the call."""
    return came.status in REFUSING and (came.code in REFUSAL_CODES or REFUSAL.search(came.message) is not None)
