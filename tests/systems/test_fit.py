"""Every real system trains through the command line, from checkpoints in the official layout, with LoRA and in full."""

import json
from pathlib import Path

import pytest
import torch

from uae import cli

CONFIGS = Path(__file__).parents[2] / "configs"
SYSTEMS = ("uae", "uniworld_v1", "metaquery", "qwen_any")


def fit(name, *deltas, extra=()):
    files = (f"{name}.yaml", *deltas, "debug/rehearsal.yaml")
    return cli.main(["fit", *(word for file in files for word in ("--config", str(CONFIGS / file))), *extra])


def networks(umm):
    """Name to network of everything that never trains."""
    parts = {f"renderer {n}": part for n, part in enumerate(umm.renderer.modules())}
    return parts | {"conditioner": umm.conditioner} if isinstance(umm.conditioner, torch.nn.Module) else parts


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_three_steps(mirrored, monkeypatch, tmp_path, name, finetune):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    run = fit(name, f"finetune/{finetune}_pretrained.yaml", extra=["--model.init_args.optimizer.init_args.lr=0.01"])
    assert run.trainer.global_step == 3
    summary = json.loads((tmp_path / "outputs" / name / "summary.json").read_text())
    assert summary["steps"] == 3
    assert 0 < summary["after"]["unified_score/held_out"] <= 1
    trained, start = run.model.umm, run.model.system.build()
    for part, network in networks(start).items():
        now = networks(trained)[part].state_dict()
        assert all(torch.equal(value, now[key]) for key, value in network.state_dict().items()), part
    base = trained.captioner.learner.network.base
    now = {key.replace(".base_layer.", "."): value for key, value in base.state_dict().items() if "lora_" not in key}
    moved = [k for k, v in start.captioner.learner.network.base.state_dict().items() if not torch.equal(v, now[k])]
    if finetune == "lora":
        assert not moved
        adapter = [p for key, p in base.named_parameters() if "lora_B" in key]
        assert all(parameter.abs().max() > 0 for parameter in adapter)
    else:
        assert len(moved) > 10
        assert not [key for key in moved if "visual" in key or "vision_tower" in key]
