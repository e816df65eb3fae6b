"""Calls of judges over the network, with the answers of both vendors in one form."""

from __future__ import annotations

import base64
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from uae.bench.judging.judges import Judge
from uae.bench.judging.requests import media_type
from uae.bench.vendors.clients import Failure, VendorClient


class Answer(NamedTuple):
    """An answer of a judge.

    Args:
        text: Text of the answer.
        model: Id of the model that answered; None if the reply was not in the form of the API.
        input_tokens: Number of input tokens that are charged; None if the server does not say.
        output_tokens: Number of output tokens that are charged; None if the server does not say.
    """

    text: str
    model: str | None
    input_tokens: int | None
    output_tokens: int | None


class JudgeClient(Protocol):
    """What a run needs of a judge's client."""

    async def complete(self, system: str, user: str, image: bytes | None) -> Answer | Failure:
        """Make one call, see `Client.complete`."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class Client(VendorClient):
    """Client of one judge.

    Args:
        judge: The judge.
    """

    def __init__(self, judge: Judge) -> None:
        super().__init__(judge)
        self.judge = judge

    async def complete(self, system: str, user: str, image: bytes | None) -> Answer | Failure:
        """Make one call.

        Args:
            system: System message.
            user: User message.
            image: Content of an image file, sent unchanged; None sends no image.
        """
        call = self._openai if self.judge.api == "openai" else self._anthropic
        return await self.guarded(lambda: call(system, user, image), _unreadable)

    async def _openai(self, system: str, user: str, image: bytes | None) -> Answer:
        parts: list[dict[str, Any]] = [{"type": "text", "text": user}]
        if image is not None:
            parts.insert(0, {"type": "image_url", "image_url": {"url": f"data:{media_type(image)};base64,{_letters(image)}"}})
        messages = [{"role": "system", "content": system}, {"role": "user", "content": parts}]
        reply = await self.api.chat.completions.create(model=self.judge.model, messages=messages, **self.judge.params)
        read, made, total = _tokens(reply, "prompt_tokens", "completion_tokens", "total_tokens")
        if read is not None and made is not None and total is not None:
            made = max(made, total - read)  # some vendors count reasoning in the total alone
        return self._answer(reply, lambda: reply.choices[0].message.content or "", read, made)

    async def _anthropic(self, system: str, user: str, image: bytes | None) -> Answer:
        parts: list[dict[str, Any]] = [{"type": "text", "text": user}]
        if image is not None:
            source = {"type": "base64", "media_type": media_type(image), "data": _letters(image)}
            parts.insert(0, {"type": "image", "source": source})
        messages = [{"role": "user", "content": parts}]
        reply = await self.api.messages.create(model=self.judge.model, system=system, messages=messages, **self.judge.params)
        said = lambda: "".join(block.text for block in reply.content if block.type == "text")  # noqa: E731
        return self._answer(reply, said, *_tokens(reply, "input_tokens", "output_tokens"))

    def _answer(self, reply: Any, text: Callable[[], object], read: int | None, made: int | None) -> Answer:
        """An answer from a reply whose form is not certain: any server may stand behind ``base_url``."""
        model = getattr(reply, "model", None)
        said: object = None
        with suppress(AttributeError, IndexError, TypeError):
            said = text()
        if not isinstance(said, str) or not isinstance(model, str):
            return _unreadable(self.line(str(reply)))
        return Answer(self.hidden(said), self.hidden(model), read, made)


def _unreadable(text: str) -> Answer:
    """The answer of a reply that is not in the form of the API."""
    return Answer(text, None, None, None)


def _letters(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _tokens(reply: Any, *keys: str) -> list[int | None]:
    """Token counts of a reply; None where the reply has no such count."""
    counts = [getattr(getattr(reply, "usage", None), key, None) for key in keys]
    return [count if isinstance(count, int) and count >= 0 else None for count in counts]
