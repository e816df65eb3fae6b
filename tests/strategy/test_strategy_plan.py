"""Numbers of docs/scaling.md, and the arithmetic of collectives."""

import argparse
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tests.strategy.test_strategy import module, trainer
from uae.memory.communication import Exchange, padded
from uae.miniature.data import SceneData
from uae.miniature.tiny import Tiny
from uae.models.finetune import LoRA

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/scaling.md").read_text()


def test_a_row_of_the_document_is_what_its_command_prints(monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling"])
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks/scaling.py")
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    local, network, speed = re.search(r"--local_gbs (\d+) --network_gbs (\d+) --tflops (\d+)", DOC).groups()
    speeds = argparse.Namespace(local_gbs=float(local), network_gbs=float(network), tflops=float(speed))
    name = "Janus-Pro-7B, full"
    assert scaling.row(name, 64, "fsdp2 by 8", speeds) in DOC.splitlines()
    assert {line.split(" | ")[0] for line in DOC.splitlines() if " | one GPU | " in line} == {f"| {run}" for run in scaling.RUNS}


@pytest.mark.parametrize(("kind", "sent"), [("all-gather", 750.0), ("reduce-scatter", 750.0), ("all-reduce", 1500.0)])
def test_a_ring_sends_all_but_ones_own_share(kind, sent):
    one = Exchange("", kind, whole=500, times=2, members=4)
    assert one.sent == sent
    assert one.seconds(local_gbs=1e-9, network_gbs=1e-8, per_node=4) == pytest.approx(sent)
    assert one.seconds(local_gbs=1e-9, network_gbs=1e-8, per_node=2) == pytest.approx(sent / 10)
    assert Exchange("", kind, 500, 1, members=2, apart=4).leaves(per_node=4)


def test_rows_that_do_not_divide_are_padded():
    assert [padded(torch.empty(32, 3), n) for n in (1, 8, 64)] == [96, 96, 192]
    assert [padded(torch.empty(shape), 4) for shape in ((), (5,), (0, 3))] == [1, 8, 0]


def test_a_checkpoint_holds_what_trains_and_is_as_small_as_the_document_says(tmp_path):
    fit, model = trainer("auto", str(tmp_path), max_steps=1, enable_checkpointing=True), module("lora")
    model.system, model.finetune = Tiny(), LoRA(rank=16)
    fit.fit(model, SceneData(batch_size=2, train_size=8))
    ours, stock = tmp_path / "ours.ckpt", tmp_path / "stock.ckpt"
    fit.save_checkpoint(ours)
    model.on_save_checkpoint = lambda checkpoint: None  # as Lightning would
    fit.save_checkpoint(stock)
    stored = torch.load(ours, weights_only=False)["state_dict"]
    assert set(stored) == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in stored)
    sizes = [round(file.stat().st_size / 1e6, 1) for file in (ours, stock)]
    assert f"{sizes[0]} MB" in DOC
    assert f"{sizes[1]} MB" in DOC
    assert 0 < sizes[0] < sizes[1] / 5
