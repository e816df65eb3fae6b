"""The memory plan as a table, with the phase that needs most memory and the verdict whether the run fits."""

from __future__ import annotations

from dataclasses import dataclass

from uae.memory.communication import Exchange
from uae.memory.floors import Floor, devices_of, lines_of
from uae.memory.processes import Processes

GIB = 2**30
PHASES = ("caption", "condition", "render", "reward", "replay", "update")


@dataclass(frozen=True)
class Row:
    """One use of memory.

    Args:
        name: Name of the tensors in the table.
        whole: Bytes per GPU on one GPU or under DDP.
        sharded: Bytes per GPU under fsdp2; None means the same as ``whole``.
        phases: Phases of a training step in which the memory is in use; empty means all.
        parameters, trainable: Number of parameters, and of those that train; 0 if the row is about no weights.
        device: Device of the memory; None is the policy's.
        keys: Keys of the configuration that make it smaller.
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
        rows: All uses of memory.
        processes: Number of processes, strategy and dtypes of the run.
        header: Line above the table with the sizes that the plan was made for.
        exchanges: Collective operations of one optimizer step of the run as configured.
        floors: The least time of each stage of a rollout and its update; empty if it was not asked for.
    """

    rows: tuple[Row, ...]
    processes: Processes
    header: str = ""
    exchanges: tuple[Exchange, ...] = ()
    floors: tuple[Floor, ...] = ()

    def there(self, phase: str, device: str | None = None) -> list[Row]:
        """Rows that are on a device in a phase."""
        return [row for row in self.rows if row.device == device and phase in (row.phases or PHASES)]

    def total(self, phase: str, sharded: bool, device: str | None = None) -> int:
        """Bytes per GPU in a phase."""
        return sum(row.size(sharded) for row in self.there(phase, device))

    def peak(self, sharded: bool | None = None, device: str | None = None) -> tuple[str, int]:
        """The phase that needs most memory, and its bytes per GPU; ``sharded=None`` is as configured."""
        sharded = self.processes.sharded if sharded is None else sharded
        totals = {phase: self.total(phase, sharded, device) for phase in PHASES}
        phase = max(totals, key=totals.__getitem__)
        return phase, totals[phase]

    @property
    def devices(self) -> list[str | None]:
        """Devices in use; None is the policy's."""
        others = {row.device for row in self.rows if row.device not in (None, "cpu")}
        return [None, *sorted(others, key=str)]

    def problem(self, available: float) -> str | None:
        """One line that says why the run does not fit into ``available`` bytes per GPU, or None if it fits."""
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
        """One line that says how much memory the run needs and whether it fits into ``available`` bytes per GPU."""
        phase, needed = self.peak()
        how = f"fsdp2 over {self.processes.count} GPUs" if self.processes.sharded else "unsharded"
        need = f"Peak as configured ({how}): {gib(needed)} GiB per GPU, phase {phase}."
        if available is None:
            return need
        problem = self.problem(available)
        return f"{need} It fits into {gib(available)} GiB." if problem is None else f"It does not fit: {problem}."

    def table(self, available: float | None = None) -> str:
        """The whole plan as aligned text, in GiB per GPU, with the verdict at the end."""
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
        parts = [self.header, "", *_aligned(lines), "", *self._sent(), *self._floors(), self.verdict(available)]
        return "\n".join(parts)

    def _sent(self) -> list[str]:
        """Lines about the bytes that a GPU sends for one optimizer step, one per kind of collective operation."""
        if not self.exchanges:
            return []
        lines = [["sent per GPU and optimizer step", "passes", "GPUs", "GiB", "over"]]
        for one in self.exchanges:
            over = "the network" if one.leaves(self.processes.per_node) else "one machine"
            lines.append([f"{one.name}, {one.kind}", f"{one.times:g}", str(one.members), gib(one.sent), over])
        total = gib(sum(one.sent for one in self.exchanges))
        return [*_aligned([*lines, [], ["together", "", "", total, ""]]), ""]

    def _floors(self) -> list[str]:
        """Lines about the least time of every stage."""
        if not self.floors:
            return []
        devices = devices_of(self.processes)
        unknown = "" if devices else "; the peaks of this device are not known, so there are no seconds"
        note = f"A floor is the larger one of operations / peak and bytes / bandwidth, not a prediction{unknown}."
        return [*_aligned(lines_of(self.floors, devices)), note, ""]


def _mark(peaks: list[bool], kinds: tuple[bool, ...]) -> str:
    """An arrow to mark the phase that needs most memory."""
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
    """A number as "8.06 B" or "303.1 M"; 0 is the empty string."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {letter}"
    return str(number) if number else ""
