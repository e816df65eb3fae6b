"""The least time that a rollout and its update can take: operations over a GPU's peak, or bytes over its bandwidth.

A floor is no prediction. It counts products of matrices, the weights that every pass reads, and the caches that a token reads; no
activations, no communication, no launches of kernels. All captions are taken to be as long as ``sampling.max_tokens`` allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from uae.memory.processes import Processes


@dataclass(frozen=True)
class Device:
    """A device's published peaks.

    Args:
        name: As a heading.
        flop: Operations per second in bfloat16 with dense matrices.
        bandwidth: Bytes per second that it reads from its memory.
    """

    name: str
    flop: float
    bandwidth: float


DEVICES = {  # by torch.cuda.get_device_name(); from NVIDIA's data sheets of H200, H100 (both SXM) and A100 80GB SXM
    "NVIDIA H200": Device("H200", 989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Device("H100", 989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": Device("A100-80", 312e12, 2.039e12),
}


def devices_of(processes: Processes) -> tuple[Device, ...]:
    """The devices to give seconds for: this machine's GPU, all that are known if it has none or another, none for a CPU."""
    if not processes.on_gpu:
        return ()
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return (DEVICES[here],) if here in DEVICES else tuple(DEVICES.values())


@dataclass(frozen=True)
class Floor:
    """What one part of a stage takes in one rollout and its update, on one GPU.

    Args:
        stage: Name of the stage, as in ``time/<stage>``.
        part: What is computed; empty if it is the whole stage.
        flop: Floating-point operations.
        moved: Bytes read from memory.
    """

    stage: str
    part: str
    flop: float
    moved: float

    def seconds(self, device: Device) -> float:
        """The longer one of computing and reading."""
        return max(self.flop / device.flop, self.moved / device.bandwidth)


def lines_of(floors: tuple[Floor, ...], devices: tuple[Device, ...]) -> list[list[str]]:
    """The floors as a table: operations, bytes, seconds on each device, and shares of the first one's time."""
    heads = [*(f"s, {device.name}" for device in devices), *(["share"] if devices else [])]
    lines = [["floor of a rollout and its update", "TFLOP", "GB moved", *heads]]

    def line(name: str, some: tuple[Floor, ...]) -> list[str]:
        seconds = [sum(floor.seconds(device) for floor in some) for device in devices]
        whole = sum(floor.seconds(device) for floor in floors for device in devices[:1])
        share = [f"{100 * seconds[0] / whole:.1f} %"] if devices else []
        totals = [sum(floor.flop for floor in some) / 1e12, sum(floor.moved for floor in some) / 1e9]
        return [name, *map(_short, totals), *map(_short, seconds), *share]

    for floor in floors:
        lines.append(line(f"{floor.stage}: {floor.part}" if floor.part else floor.stage, (floor,)))
    return [*lines, [], line("together", floors)]


def _short(number: float) -> str:
    """Three digits or more, without an exponent where it is large."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def by_stage(floors: tuple[Floor, ...], device: Device) -> dict[str, float]:
    """Seconds of every stage."""
    return {floor.stage: sum(one.seconds(device) for one in floors if one.stage == floor.stage) for floor in floors}
