"""How many images were found, how many of them are used, and why the others are not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """A count of images, or of what holds them. All that is found is used or skipped.

    Args:
        found: How many were found.
        what: What they are: "images", "rows", "shards", ...
        skipped: Reason to how many are skipped for it.
        names: The names of skipped ones, with the reasons; not of all.
    """

    found: int
    what: str = "images"
    skipped: Counter[str] = field(default_factory=Counter)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """How many are used."""
        return self.found - self.skipped.total()

    def skip(self, names: dict[str, str]) -> Tally:
        """Count further ones that were found and are skipped, by names and reasons; returns the tally."""
        self.found += len(names)
        self.skipped.update(names.values())
        self.names |= names
        return self

    def skip_one(self, name: str, reason: str) -> None:
        """Count a further one that was found and is skipped. The first name is kept for every reason."""
        self.found += 1
        if reason not in self.skipped:
            self.names[name] = reason
        self.skipped[reason] += 1

    def leave_out(self, count: int, reason: str) -> Tally:
        """Skip some of those that were counted as used; returns the tally."""
        if count:
            self.skipped[reason] += count
        return self

    def recount(self, names: dict[str, str], reason: str) -> None:
        """Skip some of those that were counted as used, by names with their own reasons."""
        self.leave_out(len(names), reason)
        self.names |= names

    def __str__(self) -> str:
        """For example ``12 images found, 9 used, 3 skipped (2 hidden, 1 of another split)``."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
        return f"{self.found} {self.what} found, {self.used} used, {self.skipped.total()} skipped" + f" ({reasons})" * bool(reasons)


def total(tallies: list[Tally], what: str) -> Tally:
    """Several tallies as one."""
    whole = Tally(sum(tally.found for tally in tallies), what)
    for tally in tallies:
        whole.skipped.update(tally.skipped)
    return whole
