"""How a model behind an API is called: its address, its key, its limits."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import ClassVar, NoReturn
from urllib.parse import urlsplit

APIS = ("openai", "anthropic")
Vendor = tuple[str, str, str]  # API, address and name of the key's variable: models that share a rate limit


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model at a vendor or on a server of one's own.

    Args:
        name: Name of the model in tables and messages.
        api: "openai" (also of other vendors and of local servers) or "anthropic".
        model: Id of the model.
        key_env: Name of the environment variable that holds the key; None for servers without a key.
        base_url: Address of the API; None is the vendor's own.
        concurrency: Number of calls at a time. Models with equal ``base_url`` and ``key_env`` share the smallest of their numbers.
        timeout: Longest duration of one try, in seconds.
        retries: Number of further tries after a failed one.
        first_pause: Pause after the first failed try, in seconds; it doubles with every further one.
        longest_pause: Longest pause between tries, in seconds. If a server asks for a longer one, the call fails.
    """

    kind: ClassVar[str] = "model"

    name: str
    api: str
    model: str
    key_env: str | None = None
    base_url: str | None = None
    concurrency: int = 4
    timeout: float = 120.0
    retries: int = 6
    first_pause: float = 1.0
    longest_pause: float = 120.0
    vendor: Vendor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vendor", (self.api, self.base_url or "", self.key_env or ""))
        if self.api not in APIS:
            self.refuse("api", f"{self.api!r}; allowed: {', '.join(APIS)}")
        self.check_whole_numbers(concurrency=1, retries=0)
        for key in ("timeout", "first_pause", "longest_pause"):
            if not isinstance(getattr(self, key), int | float) or getattr(self, key) < 0:
                self.refuse(key, f"{getattr(self, key)!r}; allowed: seconds")
        address = urlsplit(self.base_url or "https://")
        if address.scheme not in ("http", "https") or "@" in address.netloc or address.query:
            self.refuse("base_url", "not a plain http(s) address; keys belong into the variable that key_env names")

    def secret(self) -> str:
        """The key from the environment; empty for a server without a key.

        Raises:
            ValueError: The environment variable is not set.
        """
        if self.key_env is None:
            return ""
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise ValueError(f"{self.kind} {self.name!r} needs a key: set the environment variable {self.key_env}")
        return key

    def check_whole_numbers(self, **least: int) -> None:
        """Refuse a setting that is not a whole number, or less than its least value."""
        for key, minimum in least.items():
            if not isinstance(getattr(self, key), int) or getattr(self, key) < minimum:
                self.refuse(key, f"{getattr(self, key)!r}; allowed: a whole number, {minimum} or more")

    def check_price(self, key: str) -> None:
        """Refuse a price that is no finite number of USD, 0 or more."""
        price = getattr(self, key)
        if not isinstance(price, int | float) or not 0 <= price < float("inf"):
            self.refuse(key, f"{price!r}; allowed: the vendor's price, see its price list; 0 for your own server")

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise about a setting, in the words of the place where the user has set it.

        Args:
            key: Name of the setting.
            why: What it is and what is allowed. It repeats no address, since that may hold a key.
        """
        raise ValueError(f"{self.kind} {self.name!r}: {key} is {why}")
