"""What a run takes and sends on 1, 8, 64 and 512 GPUs, from architectures alone: the tables of docs/scaling.md.

    python benchmarks/scaling.py --local_gbs 450 --network_gbs 50 --tflops 400

Nothing is measured here: memory and bytes are those of ``fit --print_plan``, times are bytes over the bandwidths given (GB/s that one
GPU sends, to its own machine or to others) and operations over the speed given. Work per GPU stays the same.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

from uae.cli import CLI
from uae.memory import Plan, plan

ROOT = Path(__file__).parents[1]
FULL = "configs/finetune/full_pretrained.yaml"
SYSTEM = "--model.init_args.system.init_args"
RUNS = {  # configurations, settings, layouts
    "UAE 3B, LoRA": (("configs/uae.yaml",), (), ("ddp", "fsdp2")),
    "Qwen2.5-VL-7B + SD3.5-M, full": (
        ("configs/qwen_any.yaml", FULL),
        (f"{SYSTEM}.captioner=Qwen/Qwen2.5-VL-7B-Instruct", f"{SYSTEM}.reading.gradient_checkpointing=true"),
        ("fsdp2", "fsdp2 by 8"),
    ),
    "Janus-Pro-7B, full": (
        ("configs/janus_pro.yaml", FULL),
        (f"{SYSTEM}.checkpoint=deepseek-community/Janus-Pro-7B",),
        ("fsdp2", "fsdp2 by 8"),
    ),
}
PER_MACHINE = 8


class Planning(CLI):
    """Parses a run and plans it."""

    def instantiate_trainer(self, **kwargs: Any) -> None:
        """No trainer, which would ask for the GPUs."""

    def planned(self, with_floors: bool = False) -> Plan:
        """The plan."""
        return plan(self.model, self.datamodule, self._get(self.config_init, "trainer"), with_floors)

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def parsed(name: str, gpus: int, layout: str) -> Planning:
    """One of the runs on so many GPUs."""
    files, settings, _ = RUNS[name]
    words = [word for file in files for word in ("--config", str(ROOT / file))]
    machines, devices = max(1, gpus // PER_MACHINE), min(gpus, PER_MACHINE)
    words += ["--trainer.accelerator=gpu", f"--trainer.devices={devices}", f"--trainer.num_nodes={machines}", *settings]
    if layout == "ddp":
        words.append("--trainer.strategy=ddp" if gpus > 1 else "--trainer.strategy=auto")
    else:
        words += ["--trainer.strategy=uae.strategy.FSDP2Strategy", "--trainer.strategy.param_dtype=bfloat16"]
        words += [f"--trainer.strategy.shard_size={PER_MACHINE}"] if layout.endswith("8") else []
    return Planning(["fit", *words])


@cache
def update_flop(name: str) -> float:
    """Operations of the update, per GPU and optimizer step: they are the same on any number of GPUs."""
    run = parsed(name, 1, "ddp")
    one = run.planned(with_floors=True)
    a_rollout = sum(floor.flop for floor in one.floors if floor.stage == "update")
    return a_rollout * one.processes.accumulate / run.model.batches_per_rollout


def row(name: str, gpus: int, layout: str, speeds: argparse.Namespace) -> str:
    """A line of the table: memory, what is sent and how long that takes, how long the update computes."""
    one = parsed(name, gpus, layout).planned()
    phase, peak = one.peak()
    network = [exchange for exchange in one.exchanges if exchange.leaves(PER_MACHINE)]
    local = [exchange for exchange in one.exchanges if not exchange.leaves(PER_MACHINE)]
    seconds = [
        sum(exchange.seconds(speeds.local_gbs, speeds.network_gbs, PER_MACHINE) for exchange in exchanges)
        for exchanges in (local, network)
    ]
    sent = [sum(exchange.sent for exchange in exchanges) / 1e9 for exchanges in (local, network)]
    computes = update_flop(name) / speeds.tflops / 1e12
    cells = [name, f"{gpus}", layout if gpus > 1 else "one GPU", f"{peak / 2**30:.0f} ({phase})"]
    cells += [f"{size:.1f}" for size in sent] + [f"{sum(seconds):.2f}", f"{computes:.1f}"]
    return "| " + " | ".join(cells) + " |"


def checkpoint(name: str) -> str:
    """A line about files: what trains and its optimizer states, beside all weights of the policy and the same states."""
    rows = {row.name: row.whole for row in parsed(name, 1, "ddp").planned().rows}
    ours, everything = rows["gradients"] + rows["optimizer states"], rows["policy"] + rows["optimizer states"]
    return f"| {name} | {ours / 2**30:.2f} | {everything / 2**30:.2f} |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--local_gbs", type=float, default=450, help="GB/s that a GPU sends inside a machine")
    parser.add_argument("--network_gbs", type=float, default=50, help="GB/s that a GPU sends to other machines")
    parser.add_argument("--tflops", type=float, default=400, help="of a GPU in the update")
    speeds = parser.parse_args()
    print("| run | GPUs | layout | GiB per GPU | sent in the machine, GB | over the network, GB | s, sending | s, update computes |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (_, _, layouts) in RUNS.items():
        for gpus in speeds.gpus:
            kept = [layout for layout in layouts if gpus > PER_MACHINE or not layout.endswith("8")]
            for layout in kept if gpus > 1 else ["ddp"]:
                print(row(name, gpus, layout, speeds), flush=True)
    print("\n| run | a checkpoint, GiB | with all weights of the policy, GiB |\n|---|---|---|")
    for name in RUNS:
        print(checkpoint(name), flush=True)


if __name__ == "__main__":
    main()
