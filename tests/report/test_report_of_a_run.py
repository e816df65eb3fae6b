"""What a short run through the command line leaves to look at, with the default logger and with CSV files."""

import json
import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from uae import cli
from uae.report.curves import read_curves
from uae.report.run_page import HEADLINES

ROOT = Path(__file__).parents[2]
CONFIGS = [ROOT / "configs/tiny.yaml", ROOT / "configs/debug/fast.yaml", ROOT / "tests/untrained.yaml"]
SHOWN = ["--trainer.enable_progress_bar=true", "--trainer.enable_model_summary=true"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one name: TensorBoard, then CSV; their folder, and what they said."""
    folder = tmp_path_factory.mktemp("shown")
    words = [word for file in CONFIGS for word in ("--config", str(file))]
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr("sys.argv", ["uae"])
        cli.main(["fit", *words, *SHOWN])
        cli.main(["fit", *words, *SHOWN, "--config", str(ROOT / "configs/logger/csv.yaml")])
    return folder / "outputs", said.getvalue().splitlines()


def test_both_runs_have_a_page_with_the_same_charts(runs):
    outputs, _ = runs
    assert not list((outputs / "tiny-2").glob("events*"))
    pages = [(outputs / name / "report.html").read_text() for name in ("tiny", "tiny-2")]
    for page in pages:
        assert page.count("<svg") >= 9
        assert page.count("data:image/") >= 3 * 6
        assert len(page) < 400_000
    titles = [[line for line in page.splitlines() if "<h3>" in line] for page in pages]
    assert titles[0] == titles[1]
    seeded, other = (read_curves(outputs / name) for name in ("tiny", "tiny-2"))
    assert [step for step, _ in other["reward/mean"]] == [step for step, _ in seeded["reward/mean"]]
    assert [value for _, value in other["reward/mean"]] == pytest.approx([value for _, value in seeded["reward/mean"]])
    assert other["unified_score/held_out"][0][0] == 0


def test_the_first_screen_has_charts_with_scalars_only(runs):
    outputs, _ = runs
    assert len(list((outputs / "tiny").glob("events*"))) == 1
    events = EventAccumulator(str(outputs / "tiny"), size_guidance={"tensors": 0}).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    assert [one.title for one in layout.category] == [
        "1. Is it learning?", "2. Is it healthy?", "3. Where does the time go?", "4. What does it write?",
    ]  # fmt: skip
    scalars = events.Tags()["scalars"]
    for category in layout.category:
        assert len(category.chart) <= 6
        for chart in category.chart:
            assert any(re.match(tag, scalar) for tag in chart.multiline.tag for scalar in scalars), chart.title


def test_runs_compare_by_settings_and_metrics(runs):
    outputs, _ = runs
    events = EventAccumulator(str(outputs / "tiny")).Reload()
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert settings["group"].number_value == 4
    assert settings["lr"].number_value == 0.02
    assert settings["finetune"].string_value == "LoRA"
    assert settings["reward_layout"].number_value == 1.0
    plugin = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = HParamsPluginData.FromString(plugin).experiment
    assert {one.name for one in experiment.hparam_infos} == set(settings)
    assert sorted(one.name for one in experiment.hparam_infos if one.differs) == ["beta", "finetune", "group", "loss", "lr"]
    metrics = {one.name.tag for one in experiment.metric_infos}
    summary = json.loads((outputs / "tiny/summary.json").read_text())
    assert metrics == {"val_reward/mean", "unified_score/held_out"} == set(summary["before"]) & set(HEADLINES)
    assert metrics <= set(events.Tags()["scalars"])  # the tab takes their latest values


def test_the_log_of_a_batch_job_is_read_from_top_to_bottom(runs):
    _, said = runs
    first = said[: said.index(next(line for line in said if line.startswith("results: outputs/tiny-2")))]
    beginnings = ["results: outputs/tiny", "part ", "validation before training: ", "step 2/4  reward ", "validation at step 4: "]
    beginnings += ["step 4/4  reward ", "folder:   outputs/tiny (report.html", "look:     tensorboard --logdir outputs"]
    places = [next(n for n, line in enumerate(first) if line.startswith(start)) for start in beginnings]
    assert places == sorted(places)
    assert not any("-2" in line and "Epoch" in line for line in said)


def test_the_commands_at_the_end_work(runs, monkeypatch):
    """The run goes on in its own folder, and its result captions a folder of pictures."""
    outputs, said = runs
    commands = {line.split(":")[0]: shlex.split(line.partition(":")[2]) for line in said if line.startswith(("continue:", "use:"))}
    monkeypatch.chdir(outputs.parent)
    monkeypatch.setattr("sys.argv", ["uae"])
    went_on = cli.main(commands["continue"][3:])
    assert went_on.trainer.global_step == 8
    assert Path(went_on.trainer.log_dir) == Path("outputs/tiny-2")
    assert read_curves(Path("outputs/tiny-2"))["reward/mean"][-1][0] == 7
    (pictures := outputs.parent / "pictures").mkdir()
    Image.new("RGB", (24, 24), "red").save(pictures / "one.png")
    given = {"IMAGES": "pictures", "configs/data/folder.yaml": str(ROOT / "configs/data/folder.yaml")}
    cli.main([given.get(word, word) for word in commands["use"][3:]])
    rows = json.loads((outputs / "tiny-2/predict/predictions/captions.json").read_text())
    assert [row["name"] for row in rows] == ["one.png"]
