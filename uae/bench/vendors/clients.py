"""Calls over the network by the vendors' own client libraries, with failures in one form.

Failures are returned instead of raised. The key is blanked in every text that comes back, since a library or a server may put it
into a message, and messages are logged and written to disk.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

from uae.bench.vendors.endpoint import Endpoint

T = TypeVar("T")

RETRIED = (408, 409, 429)  # and 5xx
NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")  # codes of errors 429 and 400 that do not pass by waiting
LONGEST_TEXT = 2000  # letters of an error message that are kept


class Failure(NamedTuple):
    """A call without an answer.

    Args:
        message: Reason, in one line.
        status: HTTP status; None without an HTTP reply.
        again: Whether another try may help.
        paid: Whether the call may be charged nevertheless, because it was sent and no usable reply came.
        pause: Seconds that the server asked to wait; None if it did not ask.
        code: The vendor's code of the error; None if it has none.
    """

    message: str
    status: int | None
    again: bool
    paid: bool
    pause: float | None
    code: str | None = None


class VendorClient:
    """A vendor's client library, called for one model.

    Args:
        endpoint: The model. Its key is read from the environment.

    Raises:
        ValueError: The key or the client library is missing.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._secret = endpoint.secret()
        try:
            self._library: Any = importlib.import_module(endpoint.api)  # openai or anthropic, optional dependencies
        except ImportError:
            raise ValueError(f"{endpoint.kind} {endpoint.name!r} needs the package {endpoint.api}: pip install 'uae[bench]'") from None
        make = self._library.AsyncOpenAI if endpoint.api == "openai" else self._library.AsyncAnthropic
        # The run counts tries and their cost, so the library must not retry by itself.
        self.api: Any = make(api_key=self._secret or "none", base_url=endpoint.base_url, timeout=endpoint.timeout, max_retries=0)

    async def close(self) -> None:
        """Close the connections."""
        await self.api.close()

    async def guarded(self, call: Callable[[], Awaitable[T]], garbled: Callable[[str], T]) -> T | Failure:
        """Make one call.

        Args:
            call: Makes it, with `api`.
            garbled: Makes the answer from a description of a reply that is not in the form of the API.
        """
        library = self._library
        try:
            return await call()
        except library.APIStatusError as error:
            status, headers, code = error.status_code, error.response.headers, _code(error)
            again = (status in RETRIED or status >= 500) and code not in NO_MONEY
            return Failure(f"HTTP {status}: {self.line(str(error))}", status, again, False, _pause(headers), code)
        except library.APIConnectionError as error:  # timeouts are among them
            sent = type(error.__cause__).__name__ not in NOT_SENT
            return Failure(self.line(f"{type(error).__name__}: {error}"), None, True, sent, None)
        except (library.APIError, ValueError, TypeError) as error:  # a body that is not the API's
            return garbled(self.line(f"{type(error).__name__}: {error}"))

    def hidden(self, text: str) -> str:
        """A text with the key blanked."""
        return text.replace(self._secret, "[key]") if self._secret else text

    def line(self, text: str) -> str:
        """A text in one line that is not too long, with the key blanked."""
        return " ".join(self.hidden(text).split())[:LONGEST_TEXT]


def _code(error: object) -> str | None:
    """The code of an error of the vendor; only OpenAI's library has it."""
    code = getattr(error, "code", None)
    return code if isinstance(code, str) else None


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
