"""Calls of judges over the network by the vendors' own client libraries, with answers and failures in one form.

Failures are returned instead of raised. The key is blanked in every text that comes back, since a library or a server may put it
into a message, and messages are logged and written to disk.
"""

from __future__ import annotations

import base64
import importlib
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Protocol

from uae.bench.judging.judges import Judge
from uae.bench.judging.requests import media_type

RETRIED = (408, 409, 429)  # and 5xx
NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
LONGEST_TEXT = 2000  # letters of an error message that are kept


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


class Failure(NamedTuple):
    """A call without an answer.

    Args:
        message: Reason, in one line.
        status: HTTP status; None without an HTTP reply.
        again: Whether another try may help.
        paid: Whether the call may be charged nevertheless, because it was sent and no reply came.
        pause: Seconds that the server asked to wait; None if it did not ask.
    """

    message: str
    status: int | None
    again: bool
    paid: bool
    pause: float | None


class JudgeClient(Protocol):
    """What a run needs of a judge's client."""

    async def complete(self, system: str, user: str, image: bytes | None) -> Answer | Failure:
        """Make one call, see `Client.complete`."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class Client:
    """Client of one judge.

    Args:
        judge: The judge. Its key is read from the environment.

    Raises:
        ValueError: The key or the client library is missing.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge, self._secret = judge, judge.secret()
        try:
            self._library: Any = importlib.import_module(judge.api)  # openai or anthropic, optional dependencies
        except ImportError:
            raise ValueError(f"judge {judge.name!r} needs the package {judge.api}: pip install 'uae[bench]'") from None
        make = self._library.AsyncOpenAI if judge.api == "openai" else self._library.AsyncAnthropic
        # The run counts tries and their cost, so the library must not retry by itself.
        self._client = make(api_key=self._secret or "none", base_url=judge.base_url, timeout=judge.timeout, max_retries=0)

    async def complete(self, system: str, user: str, image: bytes | None) -> Answer | Failure:
        """Make one call.

        Args:
            system: System message.
            user: User message.
            image: Content of an image file, sent unchanged; None sends no image.
        """
        call = self._openai if self.judge.api == "openai" else self._anthropic
        return await self._guarded(call, system, user, image)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _openai(self, system: str, user: str, image: bytes | None) -> Answer:
        parts: list[dict[str, Any]] = [{"type": "text", "text": user}]
        if image is not None:
            parts.insert(0, {"type": "image_url", "image_url": {"url": f"data:{media_type(image)};base64,{_letters(image)}"}})
        messages = [{"role": "system", "content": system}, {"role": "user", "content": parts}]
        reply = await self._client.chat.completions.create(model=self.judge.model, messages=messages, **self.judge.params)
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
        reply = await self._client.messages.create(
            model=self.judge.model, system=system, messages=messages, **self.judge.params
        )
        said = lambda: "".join(block.text for block in reply.content if block.type == "text")  # noqa: E731
        return self._answer(reply, said, *_tokens(reply, "input_tokens", "output_tokens"))

    def _answer(self, reply: Any, text: Callable[[], object], read: int | None, made: int | None) -> Answer:
        """An answer from a reply whose form is not certain: any server may stand behind ``base_url``."""
        model = getattr(reply, "model", None)
        said: object = None
        with suppress(AttributeError, IndexError, TypeError):
            said = text()
        if not isinstance(said, str) or not isinstance(model, str):
            return Answer(self._line(str(reply)), None, None, None)
        return Answer(self._hidden(said), self._hidden(model), read, made)

    async def _guarded(self, call: Callable[..., Awaitable[Answer]], *given: object) -> Answer | Failure:
        library = self._library
        try:
            return await call(*given)
        except library.APIStatusError as error:
            status, headers = error.status_code, error.response.headers
            again = status in RETRIED or status >= 500
            return Failure(f"HTTP {status}: {self._line(str(error))}", status, again, False, _pause(headers))
        except library.APIConnectionError as error:  # timeouts are among them
            sent = type(error.__cause__).__name__ not in NOT_SENT
            return Failure(self._line(f"{type(error).__name__}: {error}"), None, True, sent, None)
        except (library.APIError, ValueError, TypeError) as error:  # a body that is not the API's
            return Answer(self._line(f"{type(error).__name__}: {error}"), None, None, None)

    def _hidden(self, text: str) -> str:
        return text.replace(self._secret, "[key]") if self._secret else text

    def _line(self, text: str) -> str:
        return " ".join(self._hidden(text).split())[:LONGEST_TEXT]


def _letters(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _tokens(reply: Any, *keys: str) -> list[int | None]:
    """Token counts of a reply; None where the reply has no such count."""
    counts = [getattr(getattr(reply, "usage", None), key, None) for key in keys]
    return [count if isinstance(count, int) and count >= 0 else None for count in counts]


def _pause(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, from ``retry-after-ms`` or ``Retry-After`` (seconds or a date); None if it does not ask."""
    for key, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[key]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError):
        return None
