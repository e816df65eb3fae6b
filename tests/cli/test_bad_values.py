"""A value that cannot be meant is one line with its key; a defect of a program keeps its traceback."""

import re
from pathlib import Path

import pytest

from uae import cli

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "configs/tiny.yaml", ROOT / "configs/debug/fast.yaml", ROOT / "tests/untrained.yaml"]
QUICK = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
OWN = "tests.cli.unwilling."
TRACE = "UAE_DEBUG=1 shows the traceback"


@pytest.fixture
def fit(monkeypatch, tmp_path):
    """A whole ``fit`` of the miniature, in an empty folder."""
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.delenv("UAE_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *words: cli.main(["fit", *(w for file in FILES for w in ("--config", str(file))), *QUICK, *words])


@pytest.fixture
def refused(fit, capfd):
    """The line of an error."""

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            fit(*words)
        assert stop.value.code == 2
        *_, line = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


VALUES = [
    ("--seed_everything=-1", "seed_everything=-1; allowed: 0 to 4294967295"),
    ("--run_name=", "run_name=''; allowed: the name of a folder below outputs/"),
    ("--run_name=../x", "run_name='../x'; allowed"),
    ("--run_name=/elsewhere", "run_name='/elsewhere'; allowed"),
    ("--run_name=a/-x", "run_name='a/-x'; allowed"),
    ("--run_name=a\0b", r"run_name='a\x00b'; allowed"),
    ("--run_name=" + 300 * "ä", "has a part of 600 bytes; allowed: 200"),
    ("--trainer.devices=99", "trainer.devices=99, which on accelerator cpu is the number of processes; allowed on this machine: up"),
    ("--trainer.devices=0", "trainer.accelerator=cpu, trainer.devices=0: "),
    ("--trainer.devices=[0]", "trainer.devices=[0]: `devices` selected with `CPUAccelerator` should be an int > 0"),
    ("--trainer.accelerator=gpu", "trainer.accelerator=gpu, but torch sees no GPU; allowed on this machine: cpu, auto"),
    ("--trainer.accelerator=tpu", "Requirement 'torch_xla"),
    ("--trainer.strategy=nonsense", "trainer.strategy=nonsense: "),
    ("--trainer.precision=fp8", "trainer.precision: expected one of 'transformer-engine'"),
    ("--trainer.limit_val_batches=-3", "trainer.limit_val_batches=-3: "),
    ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0; allowed: 1 or more"),
    ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1; allowed: 0 or more"),
    ("--trainer.logger=lightning.pytorch.loggers.MLFlowLogger", "trainer.logger.init_args (lightning.pytorch.loggers.MLFlowLogger): "),
    ("--trainer.callbacks+=NoSuchCallback", "trainer.callbacks: expected the dotted name of a class, got NoSuchCallback"),
    ("--model.init_args.optimizer.init_args.lr=-1", "model.init_args.optimizer.init_args.lr=-1.0: Invalid learning rate: -1.0"),
    ("--model.init_args.optimizer.init_args.betas=[a,b]", "model.init_args.optimizer.init_args.betas: expected float, got a"),
    ("--model.init_args.finetune.init_args.rank=0", "model.init_args.finetune.init_args: rank=0"),
    (f"--model.init_args.system={OWN}Unannotated", f"system: {OWN}Unannotated does not implement protocol System; allowed: a"),
    ("--data.init_args.batch_size=0", "data.init_args.batch_size=0; allowed: 1 or more"),
    ("--data.init_args.num_workers=-1", "data.init_args.num_workers=-1; allowed: 0 or more"),
    ("--data.init_args.counts=[]", "data.init_args.counts=[]; allowed: one or more numbers from 1 to 9"),
    ("--model.init_args.instruction=<|image_pad|> what is it?", "'<|image_pad|>'; allowed: text without special tokens"),
    ("--model.init_args.instruction=Describe it.<|im_end|>", "'<|im_end|>'; allowed: text without special tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "expected"), VALUES, ids=[word[:60] for word, _ in VALUES])
def test_a_bad_value_is_one_line_with_its_key(refused, word, expected):
    line = refused(word)
    assert expected in line or expected in re.sub(r"=(-?\d+)\.0\b", r"=\1", line)  # older parsers turn 3 into 3.0


@pytest.mark.parametrize("name", ["a/b", "007", "läuft gut.1"])
def test_names_of_folders_are_names_of_runs(fit, name):
    fit("--run_name", name)
    assert (Path("outputs") / name / "config.yaml").is_file()


@pytest.mark.parametrize("key", ["model.init_args.loss.beta", "trainer.gradient_clip_val"])
def test_no_number_is_a_value_nowhere(refused, tmp_path, key):
    names, file = key.split("."), tmp_path / "nan.yaml"
    file.write_text("".join(f"{'  ' * depth}{name}:{' .nan' if name == names[-1] else ''}\n" for depth, name in enumerate(names)))
    line = refused("--config", str(file))
    assert f"{names[-1]}=nan; allowed" in line


REFUSALS = [
    ("Refuses", f"trainer.callbacks.init_args (tests.cli.unwilling.Refuses): an even number is needed here; {TRACE}"),
    ("Missing", f"trainer.callbacks.init_args (tests.cli.unwilling.Missing): No module named 'no_such_library'; {TRACE}"),
    ("RefusesSetup", f"trainer.callbacks.init_args (tests.cli.unwilling.RefusesSetup): no server at nowhere; {TRACE}"),
]


@pytest.mark.parametrize(("name", "line"), REFUSALS, ids=[name for name, _ in REFUSALS])
def test_what_a_class_of_the_configuration_refuses_before_the_first_batch_is_one_line(refused, name, line):
    assert refused("--trainer.callbacks+", OWN + name) == line


def test_a_class_is_told_from_the_others_and_shows_what_it_was_given(refused, tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text(f"trainer:\n  callbacks:\n  - class_path: {OWN}Refuses\n    init_args: {{size: 3, name: y}}\n")
    assert refused("--config", str(file)).startswith(f"trainer.callbacks.init_args ({OWN}Refuses, size=3, name=y): an even")


def test_debugging_shows_what_a_class_refuses(fit, monkeypatch):
    monkeypatch.setenv("UAE_DEBUG", "1")
    with pytest.raises(RuntimeError, match="no server at nowhere"):
        fit("--trainer.callbacks+", OWN + "RefusesSetup")


@pytest.mark.parametrize(("name", "error"), [("Defective", "KeyError"), ("FailsInTraining", "ValueError")])
def test_a_defect_keeps_its_traceback(fit, name, error):
    with pytest.raises((ValueError, KeyError)) as caught:
        fit("--trainer.callbacks+", OWN + name)
    causes = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert error in [type(cause).__name__ for cause in causes]


FILES_WITH_FAULTS = {
    "empty": (b"# nothing here\n", "is empty; allowed: keys with values"),
    "list": (b"- run_name\n- tiny\n", "is a list; allowed: keys with values"),
    "word": (b"tiny\n", "is a single value; allowed: keys with values"),
    "latin": ("run_name: é".encode("latin-1"), "is not UTF-8 text (at byte 10): save it as UTF-8"),
    "nul": (b"run_name: \0", "is no YAML: unacceptable character"),
    "tab": (b"trainer:\n\tmax_steps: 3\n", "is no YAML: while scanning"),
}


@pytest.mark.parametrize("name", FILES_WITH_FAULTS)
def test_a_file_that_is_no_configuration_is_named(refused, tmp_path, name):
    content, expected = FILES_WITH_FAULTS[name]
    (tmp_path / f"{name}.yaml").write_bytes(content)
    assert f"--config {name}.yaml {expected}" in refused("--config", f"{name}.yaml")


def test_merge_keys_and_equal_keys_of_different_nodes_are_no_repetition(fit, tmp_path):
    (tmp_path / "merged.yaml").write_text("data:\n  init_args: &a {val_size: 8}\ntrainer:\n  max_steps: 1\nrun_name: merged\n")
    assert fit("--config", "merged.yaml").config.fit.run_name == "merged"


def test_a_folder_is_no_configuration(refused, tmp_path):
    assert f"--config: there is a folder, and no file, '{tmp_path}'" in refused("--config", str(tmp_path))
