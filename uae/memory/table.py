"""The plan as people read it: a table, a peak and a verdict."""

from __future__ import annotations

from dataclasses import dataclass

from uae.memory.communication import Exchange
from uae.memory.processes import Processes

GIB = 2**30
PHASES = ("caption", "condition", "render", "reward", "replay", "update")


@dataclass(frozen=True)
class Row:
    """Something that takes memory.

    Args:
        name: What it is.
        whole: Bytes per GPU, on one GPU or under DDP.
        sharded: Bytes per GPU under fsdp2; None is no different.
        phases: When it is there; empty is always.
        parameters, trainable: How many, 0 for what is no weight.
        device: None is the policy's.
        keys: What to change in the configuration to make it smaller.
    """

    name: str
    whole: int
    sharded: int | None = None
    phases: tuple[str, ...] = ()
    parameters: int = 0
    trainable: int = 0
    device: str | None = None
    keys: str = ""

    def size(self, sharded: bool) -> int:
        """Bytes per GPU."""
        return self.sharded if sharded and self.sharded is not None else self.whole


@dataclass(frozen=True)
class Plan:
    """Memory of a run. Filled by `uae.memory.plan`.

    Args:
        rows: Everything that takes memory.
        processes: How the run is spread out.
        header: The sizes the plan was made for.
        exchanges: What the run as configured sends.
        update_flop: Operations of the policy's forward and backward passes per GPU and optimizer step: 2 per parameter and
            token forward, as many for the gradient of activations, of weights that train, and of recomputation.
    """

    rows: tuple[Row, ...]
    processes: Processes
    header: str = ""
    exchanges: tuple[Exchange, ...] = ()
    update_flop: float = 0.0

    def there(self, phase: str, device: str | None = None) -> list[Row]:
        """What is on a device in a phase."""
        return [row for row in self.rows if row.device == device and phase in (row.phases or PHASES)]

    def total(self, phase: str, sharded: bool, device: str | None = None) -> int:
        """Bytes per GPU in a phase."""
        return sum(row.size(sharded) for row in self.there(phase, device))

    def peak(self, sharded: bool | None = None, device: str | None = None) -> tuple[str, int]:
        """The phase that takes most, and its bytes; ``sharded=None`` is as configured."""
        sharded = self.processes.sharded if sharded is None else sharded
        totals = {phase: self.total(phase, sharded, device) for phase in PHASES}
        phase = max(totals, key=totals.__getitem__)
        return phase, totals[phase]

    @property
    def devices(self) -> list[str | None]:
        """GPUs in use: None is the policy's."""
        others = {row.device for row in self.rows if row.device not in (None, "cpu")}
        return [None, *sorted(others, key=str)]

    def problem(self, available: float) -> str | None:
        """One line that says why the run as configured does not fit into so many bytes per GPU; None if it does."""
        sharded = self.processes.sharded
        for device in self.devices:
            phase, needed = self.peak(sharded, device)
            if needed <= available:
                continue
            biggest = sorted(self.there(phase, device), key=lambda row: -row.size(sharded))[:3]
            items = ", ".join(f"{row.name} {gib(row.size(sharded))}" for row in biggest)
            keys = dict.fromkeys(key.strip() for row in biggest for key in row.keys.split(",") if key.strip())
            where = f" on {device}" if device else ""
            return (
                f"the run needs {gib(needed)} GiB per GPU{where} (phase {phase}), and {gib(available)} GiB are there; "
                f"largest, in GiB: {items}; change {', '.join(keys)}"
            )
        return None

    def verdict(self, available: float | None) -> str:
        """One line: what the run takes, and whether that fits."""
        phase, needed = self.peak()
        how = f"fsdp2 over {self.processes.count} GPUs" if self.processes.sharded else "unsharded"
        need = f"Peak as configured ({how}): {gib(needed)} GiB per GPU, phase {phase}."
        if available is None:
            return need
        problem = self.problem(available)
        return f"{need} It fits into {gib(available)} GiB." if problem is None else f"It does not fit: {problem}."

    def table(self, available: float | None = None) -> str:
        """All of it, aligned, in GiB per GPU; ends with the verdict."""
        several = self.processes.count > 1 or self.processes.sharded
        kinds = (False, True) if several else (False,)
        columns = ["one GPU or DDP", f"FSDP2 x {self.processes.count}"] if several else ["one GPU"]
        lines = [["part", "parameters", "trainable", *columns, "phase"]]
        for row in self.rows:
            if any(row.size(sharded) for sharded in kinds):
                both = [gib(row.size(sharded)) for sharded in kinds]
                place = (" + ".join(row.phases) or "all") + (f", on {row.device}" if row.device else "")
                lines.append([row.name, count(row.parameters), count(row.trainable), *both, place])
        lines.append([])
        for device in self.devices:
            where = f" on {device}" if device else ""
            for phase in PHASES if device is None else [self.peak(device=device)[0]]:
                both = [gib(self.total(phase, sharded, device)) for sharded in kinds]
                peaks = [sharded for sharded in kinds if phase == self.peak(sharded, device)[0]]
                lines.append([f"phase {phase}{where}", "", "", *both, _mark(peaks, kinds)])
        return "\n".join([self.header, "", *_aligned(lines), "", *self._sent(), self.verdict(available)])

    def _sent(self) -> list[str]:
        """What a GPU sends for one optimizer step, a row per kind of collective."""
        if not self.exchanges:
            return []
        lines = [["sent per GPU and optimizer step", "passes", "GPUs", "GiB", "over"]]
        for one in self.exchanges:
            over = "the network" if one.leaves(self.processes.per_node) else "one machine"
            lines.append([f"{one.name}, {one.kind}", f"{one.times:g}", str(one.members), gib(one.sent), over])
        total = gib(sum(one.sent for one in self.exchanges))
        return [*_aligned([*lines, [], ["together", "", "", total, ""]]), ""]


def _mark(peaks: list[bool], kinds: tuple[bool, ...]) -> str:
    """An arrow beside the phase that takes most."""
    if not peaks:
        return ""
    return "<- peak" if len(peaks) == len(kinds) else f"<- peak of {'FSDP2' if peaks[0] else 'one GPU or DDP'}"


def _aligned(lines: list[list[str]]) -> list[str]:
    """Names and phases to the left, numbers to the right; an empty line becomes a rule."""
    widths = [max(len(line[i]) for line in lines if line) for i in range(len(lines[0]))]
    last = len(widths) - 1
    rule = "-" * (sum(widths[:-1]) + 2 * last + max(len("phase"), widths[-1]))
    texts = []
    for line in lines:
        cells = [cell.ljust(widths[i]) if i in (0, last) else cell.rjust(widths[i]) for i, cell in enumerate(line)]
        texts.append("  ".join(cells).rstrip() if line else rule)
    return [texts[0], rule, *texts[1:]]


def gib(size: float) -> str:
    """GiB with one decimal."""
    return f"{size / GIB:.1f}"


def count(number: int) -> str:
    """8.06 B, 303.1 M; nothing for nothing."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {letter}"
    return str(number) if number else ""
