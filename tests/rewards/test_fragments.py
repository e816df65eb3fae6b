"""The rewards of all fragments of configs/reward that name released checkpoints, in one run with their stand-ins."""

from pathlib import Path

import yaml

from uae import cli

ROOT = Path(__file__).parents[2]
BASE = ["configs/tiny.yaml", "configs/debug/fast.yaml", "tests/untrained.yaml"]
PARTS = {
    "clip_l14": {"clip"},
    "ensemble": {"clip", "longclip"},
    "caption_penalties": {"clip", "length", "repetition", "script", "copied"},
    "regions": {"clip", "regions"},
    "text_fidelity": {"clip", "text"},
    "pickscore": {"clip", "pickscore"},
    "hpsv2": {"clip", "hpsv2"},
    "perceptual": {"clip", "perceptual"},
    "vlm_judge": {"clip", "judge"},
}
RANGES = {
    "clip": (-1, 1), "longclip": (-1, 1), "regions": (-1, 1), "text": (0, 1), "perceptual": (-5, 0), "judge": (0, 1),
    "pickscore": (-15, 15), "hpsv2": (-1, 1), "length": (-1, 0), "repetition": (-1, 0), "script": (-1, 0), "copied": (-1, 0),
}  # fmt: skip


def reward_of(name):
    fragment = yaml.safe_load((ROOT / f"configs/reward/{name}.yaml").read_text())
    return fragment["model"]["init_args"]["reward"]["init_args"]


def test_every_fragment_weighs_the_parts_that_it_has():
    assert {file.stem for file in (ROOT / "configs/reward").glob("*.yaml")} == {*PARTS, "clip", "random", "length"}
    for name, parts in PARTS.items():
        assert reward_of(name)["parts"].keys() == reward_of(name)["weights"].keys() == parts


def test_a_run_trains_with_all_of_them(mirrored, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    united = {key: {part: value for name in PARTS for part, value in reward_of(name)[key].items()} for key in ("parts", "weights")}
    reward = {"class_path": "uae.rewards.WeightedReward", "init_args": united}
    Path("all.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"reward": reward}}}))
    files = [f"--config={file}" for file in (*(ROOT / file for file in BASE), "all.yaml")]
    run = cli.main(["fit", *files, "--trainer.max_steps=1", "--trainer.limit_val_batches=0"])
    logged = {name: float(value) for name, value in run.trainer.callback_metrics.items()}
    assert run.trainer.global_step == 1
    assert run.model.reward.weights.keys() == RANGES.keys()
    for part, (low, high) in RANGES.items():
        assert low <= logged[f"reward/{part}"] <= high, part
    total = sum(weight * logged[f"reward/{part}"] for part, weight in run.model.reward.weights.items())
    assert abs(total - logged["reward/mean"]) < 1e-4
