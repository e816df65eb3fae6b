"""What a judge is told, and how its answer is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from string import Template
from typing import Any

from uae.bench.judging.judges import read_yaml


@dataclass(frozen=True)
class Prompt:
    """A versioned instruction.

    Args:
        name: Of the prompt.
        version: Changed with every change of a word.
        image: Whether the judge sees the image.
        system: Who the judge is.
        user: What it is asked; ``$name`` is filled in.
        answer_key: The judge answers a JSON object with this key ...
        answers: ... and one of these values.
    """

    name: str
    version: str
    image: bool
    system: str
    user: str
    answer_key: str
    answers: tuple[str, ...]

    def texts(self, given: Mapping[str, str]) -> tuple[str, str]:
        """System and user text, with what is given filled in.

        Raises:
            ValueError: The prompt asks for something else.
        """
        try:
            return self.system, Template(self.user).substitute(given)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"the prompt {self.name!r} can only fill in {', '.join('$' + key for key in given)} ($$ is a dollar): {error}"
            ) from None

    def read(self, text: str) -> str | None:
        """The answer in a text, or None: no JSON object with the key and an allowed value, or several that differ."""
        if self.answer_key not in text:
            return None
        found = {self._answer(given[self.answer_key]) for given in _objects(text) if self.answer_key in given}
        return found.pop() if len(found) == 1 else None

    def _answer(self, value: Any) -> str | None:
        said = value.strip().lower() if isinstance(value, str) else json.dumps(value)
        return said if said in self.answers else None

    @property
    def digest(self) -> str:
        """Of every word: answers to another wording are other answers, whatever the version says."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _objects(text: str) -> list[dict[str, Any]]:
    """All JSON objects in a text, outermost only."""
    found, place, decoder = [], text.find("{"), json.JSONDecoder()
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
            found.append(value)
        except (ValueError, RecursionError):
            end = place + 1
        place = text.find("{", end)
    return found


def prompt_of(entry: Mapping[str, Any], where: str) -> Prompt:
    """A prompt from its settings.

    Raises:
        ValueError: Settings are missing or unknown.
    """
    names = [f.name for f in fields(Prompt)]
    if set(entry) != set(names):
        raise ValueError(f"{where!r} is no prompt; it must have exactly: {', '.join(names)}")
    answers = tuple(str(answer).lower() for answer in entry["answers"])
    return Prompt(**{**entry, "version": str(entry["version"]), "answers": answers})


def read_prompt(path: str | Path, answers: set[str]) -> Prompt:
    """The prompt of a YAML file.

    Args:
        path: The file.
        answers: What the benchmark understands.

    Raises:
        FileNotFoundError, ValueError: No file, or none of this benchmark.
    """
    prompt = prompt_of(read_yaml(path, "a prompt"), str(path))
    if set(prompt.answers) != answers:
        raise ValueError(f"answers of {str(path)!r} are {list(prompt.answers)}; this benchmark needs {sorted(answers)}")
    return prompt
