"""Folders of runs that never ran: one that is healthy, and changes that break it."""

import json
from pathlib import Path

import yaml
from torch.utils.tensorboard import SummaryWriter

from uae.checkpoints.files import VERSION, write

STEPS = 12
HEALTHY = {
    "reward/mean": [0.3 + 0.02 * step for step in range(STEPS)],
    "reward/std": [0.1] * STEPS,
    "reward/zero_variance": [0.0] * STEPS,
    "policy/loss": [0.001] * STEPS,
    "policy/kl": [0.01] * STEPS,
    "policy/clip_fraction": [0.05] * STEPS,
    "policy/ratio_max": [1.2] * STEPS,
    "policy/sampler_gap": [1e-6] * STEPS,
    "policy/entropy": [1.0] * STEPS,
    "caption/finished": [1.0] * STEPS,
    "health/skipped_updates": [0.0] * STEPS,
}
CONFIG = {
    "run_name": "made_up",
    "trainer": {"max_steps": STEPS, "callbacks": [{"class_path": "callbacks.health.Health", "init_args": {"max_kl": 0.5}}]},
    "model": {"init_args": {"ratio_tolerance": 1e-3, "sampling": {"max_tokens": 32}}},
}
SUMMARY = {
    "before": {"unified_score/held_out": 0.3, "val_reward/mean": 0.4},
    "after": {"unified_score/held_out": 0.8, "val_reward/mean": 0.7},
    "steps": STEPS,
    "seconds": 60.0,
}


def make(folder: Path, scalars=(), summary=SUMMARY, config=CONFIG, labels="", checkpoint=True) -> Path:
    """Write the folder of a run.

    Args:
        folder: The folder.
        scalars: Values by tag that replace, or are added to, those of the healthy run.
        summary: Content of ``summary.json``; None is a run that did not end.
        config: Content of ``config.yaml``.
        labels: The labels of the run, below which TensorBoard's files are.
        checkpoint: Whether there is a checkpoint of the last step.
    """
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run_name": "made_up", "labels": labels, "started": "2026-11-29 12:00:00"}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    with SummaryWriter(str(folder / labels)) as writer:
        for tag, values in {**HEALTHY, **dict(scalars)}.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)
    if checkpoint:
        write({"state_dict": {}, VERSION: "2.6.1", "global_step": STEPS}, folder / "checkpoints" / "last.ckpt")
    return folder
