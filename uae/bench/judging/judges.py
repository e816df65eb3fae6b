"""Judge files: YAML files with the models that judge, one entry each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from uae.files.settings import RepeatedKeyError, read_settings

APIS = ("openai", "anthropic")
DATED = re.compile(r"20\d{6}|20\d\d-\d\d-\d\d|-\d{4}$")
LIMITS = ("max_tokens", "max_completion_tokens")  # either parameter bounds the length of an answer
MESSAGE_TOKENS = 64  # upper bound of the tokens that a vendor adds around a text
Vendor = tuple[str, str, str]  # API, address and name of the key's variable: judges that share a rate limit


@dataclass(frozen=True)
class Judge:
    """A language model that judges, at a vendor or on a server of one's own.

    Args:
        name: Name of the judge in tables.
        api: "openai" (chat completions, also of other vendors and of local servers) or "anthropic" (messages).
        model: Id of the model with a date, since the model behind an undated alias can change unnoticed.
        family: Name of the family that the model belongs to. A judge's answers about captions of its own family can be left out.
        params: Parameters of the call, passed on unchanged. They must hold ``max_tokens`` or ``max_completion_tokens``, which bounds
            the cost.
        usd_per_million_input: Price of a million input tokens in USD; 0 for a server of one's own.
        usd_per_million_output: Price of a million output tokens in USD.
        image_tokens: Most tokens that an image counts as.
        usual_output_tokens: Number of tokens of a usual answer, reasoning included; only the cost estimate uses it.
        key_env: Name of the environment variable that holds the key; None for servers without a key.
        base_url: Address of the API; None is the vendor's own.
        allow_alias: Whether an id without a date is allowed.
        concurrency: Number of calls at a time. Judges with equal ``base_url`` and ``key_env`` share the smallest of their numbers.
        timeout: Longest duration of one try, in seconds.
        retries: Number of further tries after a failed one.
        first_pause: Pause after the first failed try, in seconds; it doubles with every further one.
        longest_pause: Longest pause between tries, in seconds. If a server asks for a longer one, the request fails.
    """

    name: str
    api: str
    model: str
    family: str
    params: Mapping[str, Any]
    usd_per_million_input: float
    usd_per_million_output: float
    image_tokens: int
    usual_output_tokens: int = 50
    key_env: str | None = None
    base_url: str | None = None
    allow_alias: bool = False
    concurrency: int = 4
    timeout: float = 120.0
    retries: int = 6
    first_pause: float = 1.0
    longest_pause: float = 120.0
    vendor: Vendor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vendor", (self.api, self.base_url or "", self.key_env or ""))
        if self.api not in APIS:
            self._refuse("api", f"{self.api!r}; allowed: {', '.join(APIS)}")
        if not self.allow_alias and not DATED.search(self.model):
            self._refuse("model", f"{self.model!r}, an alias; give an id with a date, or set allow_alias: true")
        if not isinstance(self.params, Mapping) or not any(_positive(self.params.get(key)) for key in LIMITS):
            self._refuse("params", f"without a positive {' or '.join(LIMITS)}, which bounds the cost; give one")
        self._check_numbers()
        self._check_address()

    @property
    def max_tokens(self) -> int:
        """Most tokens of an answer, reasoning included."""
        limit: int = next(self.params[key] for key in LIMITS if key in self.params)
        return limit

    def usd(self, input_tokens: float, output_tokens: float) -> float:
        """Price of some numbers of tokens, in USD."""
        return (input_tokens * self.usd_per_million_input + output_tokens * self.usd_per_million_output) / 1e6

    def most_usd(self, text: str, image: bool) -> float:
        """Most that a call can cost, in USD: a token is at least a byte, and an answer has at most ``max_tokens``."""
        return self.usd(len(text.encode()) + image * self.image_tokens + MESSAGE_TOKENS, self.max_tokens)

    def usual_usd(self, text: str, image: bool) -> float:
        """Estimated cost of a call in USD, at four letters a token."""
        return self.usd(len(text) / 4 + image * self.image_tokens, self.usual_output_tokens)

    def secret(self) -> str:
        """The key from the environment; empty for a server without a key.

        Raises:
            ValueError: The environment variable is not set.
        """
        if self.key_env is None:
            return ""
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise ValueError(f"judge {self.name!r} needs a key: set the environment variable {self.key_env}")
        return key

    def accepts(self, answered: str) -> bool:
        """Whether the model that answered is the one that was asked; an allowed alias may answer as one of its dated versions."""
        return answered == self.model or (self.allow_alias and answered.startswith(f"{self.model}-"))

    def _check_numbers(self) -> None:
        for key in ("usd_per_million_input", "usd_per_million_output"):
            price = getattr(self, key)
            if not isinstance(price, int | float) or not 0 <= price < float("inf"):
                self._refuse(key, f"{price!r}; allowed: the vendor's price, see its price list; 0 for your own server")
        least = {"image_tokens": 0, "usual_output_tokens": 0, "concurrency": 1, "retries": 0}
        for key, minimum in least.items():
            if not isinstance(getattr(self, key), int) or getattr(self, key) < minimum:
                self._refuse(key, f"{getattr(self, key)!r}; allowed: a whole number, {minimum} or more")
        for key in ("timeout", "first_pause", "longest_pause"):
            if not isinstance(getattr(self, key), int | float) or getattr(self, key) < 0:
                self._refuse(key, f"{getattr(self, key)!r}; allowed: seconds")

    def _check_address(self) -> None:
        address = urlsplit(self.base_url or "https://")
        if address.scheme not in ("http", "https") or "@" in address.netloc or address.query:
            self._refuse("base_url", "not a plain http(s) address; keys belong into the variable that key_env names")

    def _refuse(self, key: str, why: str) -> None:
        raise ValueError(f"judge {self.name!r}: {key} is {why}; set it in the judge file")


def _positive(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def read_judges(path: str | Path) -> dict[str, Judge]:
    """The judges of a YAML file, by name. The file maps each judge's name to the arguments of `Judge`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds something else. The message repeats no value of the file, since a value may be a key.
    """
    content = read_yaml(path, "judges")
    if not content or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError(f"{str(path)!r} must map names of judges to their settings (api, model, params, ...)")
    return {str(name): judge_of(str(name), entry) for name, entry in content.items()}


def judge_of(name: str, entry: Mapping[str, Any]) -> Judge:
    """A judge from its entry in a judge file.

    Raises:
        ValueError: A setting is unknown or missing.
    """
    known = {f.name: f.default is MISSING for f in fields(Judge) if f.init and f.name != "name"}
    unknown, missing = sorted(entry.keys() - known), [key for key, needed in known.items() if needed and key not in entry]
    if unknown or missing:
        problem = f"unknown {', '.join(map(str, unknown))}" if unknown else f"no {', '.join(missing)}"
        raise ValueError(f"judge {name!r} has {problem}; allowed in a judge file: {', '.join(known)}")
    return Judge(name=name, **entry)


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: Path of the file.
        what: What the file holds, for the error.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds no mapping. The message repeats nothing of the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of {what} at {str(path)!r}")
    try:
        content = read_settings(path)
    except RepeatedKeyError as error:
        raise ValueError(
            f"{str(path)!r} has a key twice, in line {error.first} and in line {error.second}; remove one of them"
        ) from None
    except (yaml.YAMLError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is no YAML mapping of {what}")
    return content
