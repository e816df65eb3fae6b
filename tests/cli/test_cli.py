"""What people meet first: typing errors, help, Ctrl-C, and which setting wins."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from uae import cli
from uae.cli.explain import explain, parameters
from uae.rewards import WeightedReward

ROOT = Path(__file__).parents[2]
TINY, FAST, UNTRAINED = ROOT / "configs/tiny.yaml", ROOT / "configs/debug/fast.yaml", ROOT / "tests/untrained.yaml"


@pytest.fixture
def fit(monkeypatch, tmp_path):
    """``fit --config configs/tiny.yaml ...`` up to the run itself."""
    monkeypatch.setattr(cli.CLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.delenv("UAE_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *words: cli.main(["fit", "--config", str(TINY), *map(str, words)])


def delta(tmp_path, node):
    file = tmp_path / "delta.yaml"
    file.write_text(node if isinstance(node, str) else yaml.safe_dump(node))
    return "--config", file


def model(**arguments):
    return {"model": {"init_args": arguments}}


MISTAKES = [
    (["--trainer.max_step", 3], "key 'trainer.max_step' is not accepted; did you mean trainer.max_steps"),
    (["--run_nam", "x"], "did you mean run_name?"),
    (["finetune/full"], "'finetune/full' is not accepted: every configuration needs a --config of its own"),
    (["--trainer.max_steps", "many"], "trainer.max_steps: expected int, got many"),
    (["--model.init_args.grup", 3], "key 'grup' is not accepted by uae.module.UnifiedGRPO (at model.init_args); did you mean group?"),
    (["--model.init_args.loss.bta", 1], "by uae.grpo.GRPOLoss (at model.init_args.loss.init_args); did you mean beta?"),
    (["--model.init_args.advantage_scale", "std"], "advantage_scale: expected one of 'group', 'batch', 'none', got std"),
    (["--model.init_args.finetune.init_args.rnk", 3], "(at model.init_args.finetune.init_args); did you mean rank?"),
    (["--model.init_args.group", 1], "model.init_args.group=1; allowed: 2 or more"),
    (["--trainer.strategy", "fsdp9"], "invalid strategy name: `strategy='fsdp9'`"),
    (["--config", "nowhere.yaml"], "--config: there is no file 'nowhere.yaml'; the package has the complete runs bagel,"),
    (["--config", "configs/finetune/ful.yaml"], "did you mean configs/finetune/full.yaml? configs/finetune of the package has full,"),
    ({"trainer": {"max_step": 3}}, "did you mean trainer.max_steps"),
    (model(loss={"beta": "x"}), "model.init_args.loss.init_args.beta: expected float, got x"),
    (model(optimizer={"init_args": {"lrr": 1}}), "key 'lrr' is not accepted by torch.optim.AdamW"),
    (model(optimizer={"init_args": {"lr": "fast"}}), "model.init_args.optimizer.init_args.lr: expected float, got fast"),
    (model(sampling={"top_p": 0.9}), "sampling.top_p=0.9 reshapes the distribution"),
    (model(finetune={"class_path": "uae.models.finetune.Lora"}), "module 'uae.models.finetune' has no attribute 'Lora'"),
    (model(metrics={"x": {"class_path": "no.where.X"}}), "No module named 'no'"),
    (model(reward={"init_args": {"wights": {"clip": 1}}}), "did you mean weights?"),
    ({"run_name": "${..nam}"}, "nam' not found"),
    ("trainer: [1\nmodel: {", "while parsing a flow sequence"),
    ("run_name: a\nmodel:\n  init_args: {seed: 1}\nrun_name: b\n", "has the key 'run_name' twice, in line 1 and in line 4"),
    (["--optimizer", "SGD"], "key 'optimizer' is not accepted"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "expected"), MISTAKES, ids=[str(m)[:50] for m, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(fit, tmp_path, capfd, mistake, expected):
    words = mistake if isinstance(mistake, list) else delta(tmp_path, mistake)
    with pytest.raises(SystemExit) as stop:
        fit(*words)
    assert stop.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "eed set" not in line and "available:" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]


def test_a_fragment_alone_is_not_a_run(monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["uae"])
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(ROOT / "configs/finetune/lora.yaml")])
    assert "the first --config must be a complete run" in capfd.readouterr().err


def test_defects_keep_their_traceback(fit, monkeypatch):
    def broken(*_):
        return torch.zeros(2) @ torch.zeros(3)  # a RuntimeError in our frame, but not one we raise

    monkeypatch.setattr(cli.CLI, "_run_subcommand", broken)
    with pytest.raises(RuntimeError):
        fit()


class Faulty(torch.utils.data.Dataset):
    """Reads in a worker: by our own code, which says what is wrong, or by a defect."""

    def __init__(self, defect):
        self.defect = defect

    def __len__(self):
        return 1

    def __getitem__(self, position):
        return [][position] if self.defect else WeightedReward({}, {})


@pytest.mark.parametrize("defect", [False, True])
def test_what_a_worker_refuses_is_one_line_too(defect):
    with pytest.raises((ValueError, IndexError)) as caught:
        next(iter(torch.utils.data.DataLoader(Faulty(defect), num_workers=1)))
    line = cli.mistake(caught.value)
    assert line is None if defect else line.startswith("reward parts and weights must name the same") and "Caught" not in line


def test_debugging_keeps_every_traceback(fit, monkeypatch):
    monkeypatch.setenv("UAE_DEBUG", "1")
    with pytest.raises(ValueError, match="allowed: 2 or more"):
        fit("--model.init_args.group", 1)


def test_suggestions_know_inherited_and_nested_parameters():
    assert set(parameters("uae.module.UnifiedGRPO", "loss")) >= {"beta", "epsilon_low"}
    assert "save_top_k" in parameters("callbacks.checkpoint.RolloutCheckpoint")  # through **kwargs
    assert parameters("no.such.Class") == []
    assert explain("something\nnobody expected") == "something"


def test_the_last_word_wins_and_interpolations_see_it(fit, tmp_path):
    words = delta(tmp_path, {"run_name": "file", "trainer": {"default_root_dir": "somewhere/${..run_name}"}})
    run = fit(*words, "--run_name", "word", "--model.group", 5)
    assert Path(run.trainer.log_dir) == Path(run.trainer.default_root_dir) == Path("somewhere/word/word")
    assert run.model.plan.group == 5


def test_defaults_that_keep_training_right(fit):
    run = fit()
    assert run.trainer.num_sanity_val_steps == float("inf")
    settings = run.config.fit.trainer
    assert (settings.inference_mode, settings.use_distributed_sampler) == (False, False)
    assert "optimizer" not in run.config.fit


def test_checkpoints_never_override_the_configuration(fit, monkeypatch, tmp_path):
    """Lightning merges stored hyper-parameters over the configuration; the same call without our method shows it."""
    file = tmp_path / "old.ckpt"
    torch.save({"hyper_parameters": {"_class_path": "uae.module.UnifiedGRPO", "group": 3}}, file)
    run = fit("--ckpt_path", file)
    assert run.model.plan.group == 8
    assert run.config.fit.ckpt_path == str(file)
    monkeypatch.setattr(cli.CLI, "_parse_ckpt_path", LightningCLI._parse_ckpt_path)
    assert fit("--ckpt_path", file).model.plan.group == 3  # or the method has a new name, and ours overrides nothing


@pytest.mark.parametrize("logger", ["true", "false", "lightning.pytorch.loggers.CSVLogger"])
def test_last_finds_the_checkpoints_of_an_earlier_start_whatever_logs(fit, tmp_path, logger):
    logging = ["--trainer.logger", logger, *(["--trainer.logger.save_dir", tmp_path] if "CSV" in logger else [])]
    for _ in range(2):  # Lightning's loggers begin a new folder every time
        trainer = fit(*logging).trainer
        callback = trainer.checkpoint_callback
        callback.setup(trainer, None, "fit")
        assert callback.dirpath == "outputs/tiny/checkpoints"
        trainer.loggers and trainer.logger.log_metrics({"x": 1.0}, step=0)
    assert fit(*logging, "--trainer.default_root_dir", "big").trainer.checkpoint_callback.dirpath == "big/tiny/checkpoints"


def test_the_saved_configuration_runs_again(fit, tmp_path):
    first = fit("--model.group", 4, "--config", FAST)
    saver = next(callback for callback in first.trainer.callbacks if isinstance(callback, SaveConfigCallback))
    saver.setup(first.trainer, first.model, "fit")
    saved = Path("outputs/tiny/config.yaml")
    again = cli.main(["fit", "--config", str(saved), "--run_name", "again"])
    one, two = ({**run.config.fit.as_dict(), "config": None, "run_name": None} for run in (first, again))
    assert one == two
    assert Path(again.trainer.log_dir) == Path("outputs/again")


PLANNED = model(system={"class_path": "tests.memory.planned.Planned"})


def test_the_plan_needs_no_gpu_and_leaves_nothing_behind(fit, tmp_path, capfd):
    words = delta(tmp_path, {**PLANNED, "trainer": {"accelerator": "gpu", "devices": 2, "strategy": "fsdp2"}})
    with pytest.raises(SystemExit) as stop:
        fit(*words, "--print_plan", "--memory_gib", 1000)
    assert stop.value.code == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("Planned with LoRA: 8 images x 8 captions per GPU")
    assert [line.split()[1] for line in lines if line.startswith("phase ")][-1] == "update"
    assert lines[-1].startswith("Peak as configured (fsdp2 over 2 GPUs): ")
    assert lines[-1].endswith("It fits into 1000.0 GiB.")
    assert list(tmp_path.iterdir()) == [tmp_path / "delta.yaml"]


def test_a_run_that_cannot_fit_says_so_before_it_loads_anything(fit, tmp_path, capfd, monkeypatch):
    words = delta(tmp_path, PLANNED)
    with monkeypatch.context() as patch:
        patch.setattr(LightningCLI, "instantiate_trainer", lambda self, **_: pytest.fail("too late"))
        with pytest.raises(SystemExit) as stop:
            fit(*words, "--memory_gib", 0.01)
    assert stop.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "GiB per GPU (phase " in line
    assert "0.0 GiB are there; largest" in line
    assert fit(*words, "--memory_gib", 1000).trainer.max_steps > 0
    assert fit(*words, "--memory_gib", 0).trainer.max_steps > 0  # off


def test_a_gpu_is_asked_for_its_own_memory(fit, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**20))
    with pytest.raises(SystemExit):
        fit(*delta(tmp_path, {**PLANNED, "trainer": {"accelerator": "gpu"}}))
    assert "0.0 GiB are there" in capfd.readouterr().err
    assert fit(*delta(tmp_path, PLANNED)).trainer.max_steps > 0  # on the CPU


def test_what_cannot_be_planned_is_not_stopped(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.memory.planned.Planned.blueprint", lambda self: 1 / 0)
    with pytest.warns(UserWarning, match="no memory plan, so nothing is checked: division by zero"):
        assert fit(*delta(tmp_path, PLANNED), "--memory_gib", 1).trainer.max_steps > 0


def test_a_plan_is_of_fit(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["validate", "--config", str(TINY), "--print_plan"])
    assert "use fit --print_plan" in capfd.readouterr().err


def test_a_system_without_a_plan_says_so(fit, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        fit(*delta(tmp_path, model(system={"class_path": "tests.tiny_random.RandomTiny"})), "--print_plan")
    assert stop.value.code == 2
    assert "error: RandomTiny has no memory plan" in capfd.readouterr().err


def test_a_missing_checkpoint_is_a_mistake(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["validate", *configs(TINY, FAST, UNTRAINED), "--ckpt_path", "nowhere.ckpt"])
    assert stop.value.code == 2
    assert "nowhere.ckpt" in capfd.readouterr().err.splitlines()[-1]


def test_a_place_that_takes_no_results_is_a_mistake(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/taken").touch()
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *configs(TINY, FAST, UNTRAINED), "--run_name", "taken"])
    assert stop.value.code == 2
    assert "outputs/taken" in (line := capfd.readouterr().err.splitlines()[-1])
    assert line.startswith("error: ")
    assert "correct run_name" in line


def configs(*files):
    return [word for file in files for word in ("--config", str(file))]


def subprocess_of(code, cwd, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *code, *words],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_ctrl_c,
    )


def heed_ctrl_c():
    """A shell's background jobs ignore Ctrl-C, and their children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_help_loads_nothing_heavy_that_lightning_does_not(tmp_path):
    heavy = (
        "diffusers",
        "peft",
        "open_clip",
        "timm",
        "tokenizers",
        "transformers.modeling_utils",
        "tensorboard",
        "pandas",
    )
    code = f"""
import sys
import lightning.pytorch.cli
before = set(sys.modules)
from uae import cli
try:
    cli.main(["fit", "--help"])
except SystemExit as stop:
    assert stop.code == 0
print("LOADED", [name for name in {heavy} if name in set(sys.modules) - before])
"""
    out, err = subprocess_of(["-c", code], tmp_path).communicate(timeout=300)
    assert "--run_name" in out, err
    assert out.splitlines()[-1] == "LOADED []"


def test_ctrl_c_is_one_line_status_130_and_still_a_summary(tmp_path):
    words = ["fit", *configs(TINY, FAST, UNTRAINED), "--trainer.max_steps", "100000", "--run_name", "long"]
    process = subprocess_of(["-m", "uae.cli"], tmp_path, *words, "--trainer.callbacks+", "tests.callbacks.beacon.Beacon")
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "beacon").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == cli.INTERRUPTED == 130
    assert "Traceback" not in out + err
    assert err.strip().splitlines()[-1].startswith("interrupted at step ")
    summary = yaml.safe_load((tmp_path / "outputs/long/summary.json").read_text())
    assert summary["steps"] >= 4
    assert summary["before"]["unified_score/layout"] == pytest.approx(summary["before"]["unified_score/held_out"])
    assert (tmp_path / "outputs/long/config.yaml").is_file()


@pytest.mark.parametrize("split", [False, True], ids=["with_=", "two_words"])
@pytest.mark.parametrize("null", ["null", "~"])
def test_null_on_the_command_line_is_null(fit, split, null):
    """As in a file, also inside the arguments of a class, where the parser alone would read the text "None"."""
    words = ["--config", ROOT / "configs/stages/understanding_for_generation.yaml", "--model.init_args.finetune.init_args.adapter=x"]
    for key in ("--model.init_args.finetune.init_args.adapter", "--model.init_args.exploration.window"):
        words += [key, null] if split else [f"{key}={null}"]
    arguments = fit(*words).config["fit"].model.init_args
    assert arguments.finetune.init_args.adapter is None
    assert arguments.exploration.window is None
    assert arguments.finetune.init_args.rank == 16  # what stands beside is kept
