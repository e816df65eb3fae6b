"""One short run through the command line, looked at from all sides."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from uae import cli

ROOT = Path(__file__).parents[2]
CONFIGS = [ROOT / "configs/tiny.yaml", ROOT / "configs/debug/fast.yaml", ROOT / "tests/untrained.yaml"]


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """Run the command line in a folder of its own; results go below ``outputs``."""
    folder = tmp_path_factory.mktemp("runs")

    def run(subcommand, *words):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("sys.argv", ["uae"])
            files = [word for file in CONFIGS for word in ("--config", str(file))]
            return cli.main([subcommand, *files, *map(str, words)])

    run.folder = folder
    return run


@pytest.fixture(scope="session")
def run(command):
    """Four steps, with validation intervals that do not meet the last one."""
    finished = command("fit", "--run_name", "short", "--trainer.val_check_interval", 3)
    folder = command.folder / "outputs/short"
    return SimpleNamespace(cli=finished, folder=folder, summary=json.loads((folder / "summary.json").read_text()))


@pytest.fixture(scope="session")
def events(run):
    """The run's TensorBoard events, read back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run.folder), size_guidance={"images": 0, "tensors": 0, "histograms": 0}).Reload()
