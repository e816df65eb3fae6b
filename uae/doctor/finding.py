"""A finding of the doctor: what was looked at, what was found, and what to change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "wrong"]
INDENT = 7


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        state: "ok"; "note" is worth knowing and no fault; "wrong" needs a change.
        text: What was found, with its number.
        cure: What to change, with the key as it is typed; every wrong finding has one.
    """

    state: State
    text: str
    cure: str = ""

    def __post_init__(self) -> None:
        """Refuse a fault without a cure."""
        if self.state == "wrong" and not self.cure:
            raise ValueError(f"a wrong finding needs a cure: {self.text}")

    def __str__(self) -> str:
        """A line with the state and what was found, and a line with the cure if there is one."""
        mark = self.state.upper() if self.state == "wrong" else self.state
        cure = f"\n{'':{INDENT}}-> {self.cure}" if self.cure else ""
        return f"{mark:{INDENT}}{self.text}{cure}"


def ok(text: str) -> Finding:
    """Something that is as it should be."""
    return Finding("ok", text)


def note(text: str, cure: str = "") -> Finding:
    """Something that is worth knowing and no fault."""
    return Finding("note", text, cure)


def wrong(text: str, cure: str) -> Finding:
    """Something that needs a change."""
    return Finding("wrong", text, cure)
