"""Prompt files: the instruction of a judge, and how its answer is read."""

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
        name: Name of the prompt.
        version: Version of the prompt, which changes with every change of a word.
        image: Whether the judge sees the image.
        system: System message.
        user: User message; placeholders ``$name`` are filled in.
        answer_key: Key of the JSON object that the judge answers.
        answers: Allowed values under that key.
    """

    name: str
    version: str
    image: bool
    system: str
    user: str
    answer_key: str
    answers: tuple[str, ...]

    def texts(self, given: Mapping[str, str]) -> tuple[str, str]:
        """System and user message with the placeholders filled in.

        Args:
            given: Name of each placeholder to its text.

        Raises:
            ValueError: The prompt has another placeholder.
        """
        try:
            return self.system, Template(self.user).substitute(given)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"the prompt {self.name!r} can only fill in {', '.join('$' + key for key in given)} ($$ is a dollar): {error}"
            ) from None

    def read(self, text: str) -> str | None:
        """The answer in a text; None if no JSON object holds the key with an allowed value, or if several objects differ."""
        if self.answer_key not in text:
            return None
        found = {self._answer(given[self.answer_key]) for given in _objects(text) if self.answer_key in given}
        return found.pop() if len(found) == 1 else None

    def _answer(self, value: object) -> str | None:
        said = value.strip().lower() if isinstance(value, str) else json.dumps(value)
        return said if said in self.answers else None

    @property
    def digest(self) -> str:
        """The sha256 of all words of the prompt, so that answers to another wording are never reused, whatever the version says."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _objects(text: str) -> list[dict[str, Any]]:
    """All outermost JSON objects in a text."""
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
    """A prompt from the content of a prompt file.

    Args:
        entry: Content of the file.
        where: Name of the file, for the error.

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
        path: Path of the file.
        answers: Answers that the benchmark understands.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds no prompt, or one with other answers.
    """
    prompt = prompt_of(read_yaml(path, "a prompt"), str(path))
    if set(prompt.answers) != answers:
        raise ValueError(f"answers of {str(path)!r} are {list(prompt.answers)}; this benchmark needs {sorted(answers)}")
    return prompt
