"""Panels and tables in every logger: W&B and MLflow by modules with the same functions, as neither is installed here."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import yaml

from tests.conftest import data
from uae import cli
from uae.loggers import CSV, FollowsRun, MLFlow, WeightsAndBiases
from uae.loggers.showing import markdown

ROOT = Path(__file__).parents[2]
CONFIGS = [ROOT / "configs/tiny.yaml", ROOT / "configs/debug/fast.yaml", ROOT / "tests/untrained.yaml"]


def module(name, **content):
    made = ModuleType(name)
    made.__spec__ = mock.Mock()
    vars(made).update(content)
    return made


class FakeRun:
    """What ``wandb.init`` returns."""

    def __init__(self):
        self.logged, self.config, self.id = [], {}, "0"
        self.config = SimpleNamespace(update=lambda settings, **_: self.settings.update(settings))
        self.settings = {}

    def log(self, values):
        self.logged.append(values)

    def define_metric(self, *_, **__):
        pass


@pytest.fixture
def wandb(monkeypatch):
    """A module that remembers; its pictures, tables and histograms are pairs of a name and what they were made of."""
    run, asked = FakeRun(), []

    def init(**settings):
        asked.append(settings)
        return run

    made = module(
        "wandb", run=None, init=init, Image=lambda image, **_: ("image", image.size), Table=lambda **given: ("table", given),
        Histogram=lambda values: ("histogram", values),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", made)
    monkeypatch.setitem(sys.modules, "wandb.sdk", module("wandb.sdk"))
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib", module("wandb.sdk.lib", RunDisabled=FakeRun))
    monkeypatch.setitem(sys.modules, "wandb.wandb_run", module("wandb.wandb_run", Run=FakeRun))
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return SimpleNamespace(run=run, asked=asked)


@pytest.fixture
def mlflow(monkeypatch):
    """A client that remembers every call."""
    client = mock.MagicMock()
    client.get_experiment_by_name.return_value = None
    client.create_run.return_value.info.run_id = "7"
    modules = {
        "mlflow": module("mlflow", set_tracking_uri=mock.Mock()),
        "mlflow.tracking": module("mlflow.tracking", MlflowClient=mock.Mock(return_value=client), context=mock.MagicMock()),
        "mlflow.tracking.context": module("mlflow.tracking.context", resolve_tags=dict),
        "mlflow.tracking.context.registry": module("mlflow.tracking.context.registry", resolve_tags=dict),
        "mlflow.utils": module("mlflow.utils"),
        "mlflow.utils.mlflow_tags": module("mlflow.utils.mlflow_tags", MLFLOW_RUN_NAME="mlflow.runName"),
        "mlflow.entities": module("mlflow.entities", Metric=SimpleNamespace, Param=SimpleNamespace),
    }
    for name, made in modules.items():
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    return client


@pytest.fixture
def fit(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])

    def run(fragment, *words):
        files = [word for file in (*CONFIGS, ROOT / f"configs/logger/{fragment}.yaml") for word in ("--config", str(file))]
        return cli.main(["fit", *files, "--trainer.max_steps=2", "--trainer.val_check_interval=2", *words])

    return run


def test_weights_and_biases_gets_everything(fit, wandb):
    fit("wandb", "--label.note=x", "--trainer.logger.project=mine")
    (asked,) = wandb.asked
    assert (asked["project"], asked["name"], asked["dir"]) == ("mine", "tiny/x", "outputs/tiny")
    assert re.fullmatch("[0-9a-f]{16}", asked["id"])
    logged = {}
    for values in wandb.run.logged:
        for tag, value in values.items():
            logged.setdefault(tag, []).append((values["trainer/global_step"], value))
    assert [step for step, _ in logged["panel/image_1"]] == [0, 2]
    ((kind, _size),) = logged["panel/image_4"][0][1]
    assert kind == "image"
    kind, table = logged["panel/captions"][0][1]
    assert kind == "table"
    assert table["columns"] == ["image", "caption", "reward", "advantage"]
    assert len(table["data"]) == 4 * 4
    assert logged["reward/histogram"][0][1][0] == "histogram"
    assert "hacking/disagreement" in logged
    assert "reward/mean" in logged
    assert wandb.run.settings["group"] == 4
    assert (Path("outputs/tiny/report.html").read_text()).count("<svg") >= 9  # the CSV file beside it has the curves


def test_a_run_that_goes_on_goes_on_there(wandb, tmp_path):
    ids = []
    for started in ("one", "one", "two"):
        (tmp_path / "run.json").write_text(started)
        logger = WeightsAndBiases()
        logger.follow(tmp_path, "")
        ids.append(logger.version)
    assert ids[0] == ids[1] != ids[2]


def test_mlflow_gets_what_it_can_hold(fit, mlflow):
    fit("mlflow")
    assert mlflow.create_run.call_args.kwargs["tags"]["mlflow.runName"] == "tiny"
    files = {call.kwargs["artifact_file"] for call in mlflow.log_image.call_args_list}
    assert {"panel/image_1/step-000000.png", "panel/image_4/step-000002.png", "hacking/disagreement/step-000002.png"} <= files
    ((run, table), options) = mlflow.log_table.call_args_list[0]
    assert (run, options) == ("7", {"artifact_file": "panel/captions/step-000000.json"})
    assert {len(column) for column in table.values()} == {4 * 4}
    settings = {one.key: one.value for call in mlflow.log_batch.call_args_list for one in call.kwargs.get("params", ())}
    assert settings["group"] == "4"


@pytest.mark.parametrize(("fragment", "package"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_missing_package_is_one_line_with_the_command(fit, capsys, fragment, package, monkeypatch):
    monkeypatch.setattr("uae.loggers.following.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        fit(fragment)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"pip install {package}" in line
    assert "trainer.logger" in line


def test_every_fragment_follows_the_run():
    fragments = sorted((ROOT / "configs/logger").glob("*.yaml"))
    assert [file.stem for file in fragments] == ["csv", "mlflow", "wandb"]
    for file in fragments:
        loggers = yaml.safe_load(file.read_text())["trainer"]["logger"]
        for one in loggers if isinstance(loggers, list) else [loggers]:
            assert one["class_path"] in {f"uae.loggers.{kind.__name__}" for kind in (CSV, MLFlow, WeightsAndBiases)}
    assert isinstance(CSV(), FollowsRun)


def test_no_text_breaks_a_table():
    nasty = ["a | b", "line\nbreak\r\nagain", "<script>", "", "\\", "tab\there"]
    rows = markdown(["caption", "reward"], [[text, 0.5] for text in nasty]).splitlines()
    assert len(rows) == 2 + 6
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert "<" not in "".join(rows)
    (_, _, long) = markdown(["caption"], [["<b> " + "word " * 40]]).splitlines()
    lines = long.strip("| ").split("<br>")
    assert " ".join(lines) == ("&lt;b> " + "word " * 40).strip()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 75  # 70, and one "<" that is written in four characters


def test_the_csv_logger_alone_shows_no_panels(trainer, build, tmp_path):
    from callbacks.panels import RolloutPanels

    logger = CSV()
    logger.follow(tmp_path, "")
    trainer(callbacks=[RolloutPanels()], logger=logger, log_every_n_steps=1).fit(build(), data(batch_size=2))
    assert "reward/mean" in (tmp_path / "csv/version_0/metrics.csv").read_text()
