"""One tiny run that can be killed, and continued: what `benchmarks.kill_matrix` tries again and again.

Every process is forked from one that has imported everything: a trial takes a second or two, nearly all of it training.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from callbacks.checkpoint import RolloutCheckpoint
from callbacks.preemption import Preemption
from tests.tiny_random import RandomTiny
from uae.checkpoints.files import CheckpointFiles
from uae.grpo import GRPOLoss
from uae.miniature.data import SceneData
from uae.models.finetune import Full, LoRA
from uae.module import UnifiedGRPO
from uae.rewards import CaptionFormat, WeightedReward
from uae.strategy import FSDP2Strategy
from uae.types import Sampling

STEPS = 8  # two per rollout; an epoch has four
MODES = {  # processes, strategy, what trains
    "one": (1, "auto", "lora"),
    "ddp": (2, "ddp", "lora"),
    "shards": (2, "fsdp2", "full"),
    "consolidated": (2, "file", "full"),
}


class Losses(Callback):
    """Appends every step's loss to a file at once: evidence that survives a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """A file per process that listens to signals by now."""
        (self.folder / f"listening{trainer.global_rank}").touch()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """The loss, to the last bit."""
        loss = trainer.callback_metrics["policy/loss"].item().hex()
        if trainer.is_global_zero:
            with open(self.folder / "losses.jsonl", "a") as file:
                file.write(json.dumps({"step": trainer.global_step, "loss": loss, "process": os.getpid()}) + "\n")


def train(mode: str, folder: Path) -> None:
    """Start or continue the run of a folder."""
    devices, strategy, finetune = MODES[mode]
    module = UnifiedGRPO(
        system=RandomTiny(denoising_steps=1, spread=0.05),
        reward=WeightedReward({"format": CaptionFormat(r".*e.*")}, {"format": 1.0}),
        finetune=LoRA(rank=4) if finetune == "lora" else Full(r"^(?!.*visual\.)"),
        loss=GRPOLoss(beta=0.05),
        sampling=Sampling(max_tokens=4),
        group=2,
        num_iterations=2,
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10),
    )
    checkpoint = RolloutCheckpoint(2, dirpath=folder / "checkpoints", filename="{step}", save_last="link")
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=FSDP2Strategy(save_distributed_checkpoint=False) if strategy == "file" else strategy,
        max_steps=STEPS,
        default_root_dir=folder,
        callbacks=[checkpoint, Preemption(), Losses(folder)],
        plugins=[CheckpointFiles()],
        inference_mode=False,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = SceneData(batch_size=4 // devices, train_size=8, val_size=2, eval_batch_size=1)
    trainer.fit(module, data, ckpt_path="last")


def start(mode: str, folder: Path) -> list[int]:
    """Fork the processes of a run; their ids. Output goes to ``log`` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(MODES[mode][0]):
        process = os.fork()
        if not process:
            _child(mode, folder, rank, port)
        processes.append(process)
    return processes


def _child(mode: str, folder: Path, rank: int, port: int) -> None:
    """Never returns."""
    status = 1
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        warnings.simplefilter("ignore")
        if MODES[mode][0] > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ.update({**address, **ranks, "TORCHELASTIC_RUN_ID": "kills"})
        torch.set_num_threads(1)
        train(mode, folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
