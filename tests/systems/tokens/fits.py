"""Short runs of systems that draw image tokens, from stand-ins of their checkpoints, through the command line."""

import yaml

from tests.systems.test_fit import CONFIGS
from uae import cli

CLIP = {"class_path": "uae.encoders.HFEncoder", "init_args": {"path": "openai/clip-vit-large-patch14"}}


def enter(folder, monkeypatch, tmp_path, **system):
    """Make a folder the mirror of checkpoints, and write the last file of the run: arguments of the system, one encoder."""
    monkeypatch.setenv("UAE_CHECKPOINTS", str(folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    delta = yaml.safe_load((CONFIGS / "debug/rehearsal_tokens.yaml").read_text())
    delta["model"]["init_args"]["system"]["init_args"] |= system
    delta["model"]["init_args"]["unified_score"] = {
        "class_path": "uae.metrics.UnifiedScore", "init_args": {"encoders": {"clip": CLIP}, "held_out": ["clip"]}
    }  # fmt: skip
    (tmp_path / "delta.yaml").write_text(yaml.safe_dump(delta))
    return folder


def fit(name, *deltas, extra=()):
    """Run ``configs/<name>.yaml`` with fragments, then the file that `enter` wrote."""
    files = (CONFIGS / f"{name}.yaml", *(CONFIGS / delta for delta in deltas), "delta.yaml")
    return cli.main(["fit", *(word for file in files for word in ("--config", str(file))), *extra])
