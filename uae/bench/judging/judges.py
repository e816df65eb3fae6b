"""Judge files: YAML files with the models that judge, one entry each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

from uae.bench.vendors.endpoint import Endpoint
from uae.files.settings import RepeatedKeyError, read_settings

DATED = re.compile(r"20\d{6}|20\d\d-\d\d-\d\d|-\d{4}$")
LIMITS = ("max_tokens", "max_completion_tokens")  # either parameter bounds the length of an answer
MESSAGE_TOKENS = 64  # upper bound of the tokens that a vendor adds around a text


@dataclass(frozen=True, kw_only=True)
class Judge(Endpoint):
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
        allow_alias: Whether an id without a date is allowed.

    For all other settings see `Endpoint`.
    """

    kind: ClassVar[str] = "judge"

    family: str
    params: Mapping[str, Any]
    usd_per_million_input: float
    usd_per_million_output: float
    image_tokens: int
    usual_output_tokens: int = 50
    allow_alias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.allow_alias and not DATED.search(self.model):
            self.refuse("model", f"{self.model!r}, an alias; give an id with a date, or set allow_alias: true")
        if not isinstance(self.params, Mapping) or not any(_positive(self.params.get(key)) for key in LIMITS):
            self.refuse("params", f"without a positive {' or '.join(LIMITS)}, which bounds the cost; give one")
        self.check_price("usd_per_million_input")
        self.check_price("usd_per_million_output")
        self.check_whole_numbers(image_tokens=0, usual_output_tokens=0)

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

    def accepts(self, answered: str) -> bool:
        """Whether the model that answered is the one that was asked; an allowed alias may answer as one of its dated versions."""
        return answered == self.model or (self.allow_alias and answered.startswith(f"{self.model}-"))

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise about a setting of the judge file."""
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
