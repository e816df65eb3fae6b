"""Several stages by one command: what each starts from, what all of them leave, and what ends them on the way."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback
from PIL import Image

from tests.two_processes import run_on_two
from uae import cli
from uae.files.tiles import GAP, TILE

ROOT = Path(__file__).parents[2]
CAPTIONS, IMAGES = (str(ROOT / f"configs/stages/{one}.yaml") for one in ("generation_for_understanding", "understanding_for_generation"))
SECOND, THIRD = "2-understanding_for_generation", "3-generation_for_understanding"
TWICE = "--model.init_args.reconstructions 2 --model.init_args.image_lr 0.02"
CALLBACKS = [
    {"class_path": "tests.cli.test_stages.Fault"},
    {"class_path": "callbacks.summary.Summary"},
    {"class_path": "callbacks.examples.Examples", "init_args": {"images": 2}},
    {"class_path": "callbacks.export.Export"},
    {"class_path": "callbacks.preemption.Preemption"},
    {"class_path": "callbacks.checkpoint.RolloutCheckpoint", "init_args": {"every_n_train_steps": 2, "save_last": "link"}},
]
TRAINER = {"callbacks": CALLBACKS, "max_steps": 2, "logger": False, "val_check_interval": None}


class Fault(Callback):
    """Fails, or sends a signal, at a step of the stages whose training is ``train``."""

    at: tuple[str, int] | None = None
    what: object = None

    def on_train_batch_end(self, trainer, module, *_):
        if Fault.at == (module.plan.train, trainer.global_step):
            Fault.at = None
            Fault.what()


def fail():
    raise RuntimeError("the machine is gone")


def ask():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def fit(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    few = {"trainer": TRAINER, "data": {"init_args": {"val_size": 2, "train_size": 16, "eval_batch_size": 2}}}
    Path("few.yaml").write_text(yaml.safe_dump(few))

    def run(*words, base="tiny", delta="tests/untrained.yaml"):
        files = [f"configs/{base}.yaml", "configs/debug/fast.yaml", *([delta] if delta else [])]
        return cli.main(["fit", *(f"--config={ROOT / file}" for file in files), "--config=few.yaml", *words])

    yield run
    Fault.at = None
    for number, handler in handlers.items():
        signal.signal(number, handler)


def in_stages(*options):
    """The words of a chain of captions, images, captions."""
    return [f"--stage={CAPTIONS}", "--stage", f"{IMAGES} {TWICE} {' '.join(options)}", "--stage", CAPTIONS]


def exports(folder):
    """The bytes of all exported weights, by file."""
    folder = Path(folder)
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("**/export/**/*.safetensors"))}


def assert_chained(folder, weights, renderer):
    """Each stage starts where the one before ended, changes what it trains, and hands the other half on byte by byte."""
    found = exports(folder)
    captions = [found[f"{stage}export/{weights}"] for stage in ("", f"{SECOND}/", f"{THIRD}/")]
    images = [found[f"{stage}/export/renderer/{renderer}"] for stage in (SECOND, THIRD)]
    assert captions[0] == captions[1] != captions[2]
    assert images[0] == images[1]
    assert f"export/renderer/{renderer}" not in found
    assert_continuous(folder)


def assert_continuous(folder):
    summaries = [json.loads(Path(folder, stage, "summary.json").read_text()) for stage in ("", SECOND, THIRD)]
    for one, next_one in zip(summaries, summaries[1:], strict=False):
        assert {k: v for k, v in one["after"].items() if "time" not in k} == pytest.approx(next_one["before"], abs=1e-6)


def test_a_chain_is_what_a_user_does_by_hand(fit, tmp_path, capsys):
    (tmp_path / "outputs/tiny").mkdir(parents=True)
    (tmp_path / "outputs/tiny/run.json").write_text(json.dumps({"run_name": "tiny", "labels": "", "started": ""}))
    fit(*in_stages())
    said = capsys.readouterr().out
    assert f"stage 2 of 3: {IMAGES}\nresults: outputs/tiny-2/{SECOND}\n" in said
    assert_chained("outputs/tiny-2", "adapter_model.safetensors", "adapter_model.safetensors")

    key = "--model.init_args."
    fit("--run_name=a", f"--config={CAPTIONS}")
    fit("--run_name=b", f"--config={IMAGES}", *TWICE.split(), f"{key}finetune.init_args.adapter=outputs/a/export")
    fit(
        "--run_name=c", f"--config={CAPTIONS}", f"{key}finetune.init_args.adapter=outputs/b/export",
        f"{key}image_finetune=uae.models.finetune.LoRA", f"{key}image_finetune.init_args.adapter=outputs/b/export/renderer",
    )  # fmt: skip
    by_hand = {**exports("outputs/a"), **{f"{SECOND}/{k}": v for k, v in exports("outputs/b").items()}}
    by_hand |= {f"{THIRD}/{k}": v for k, v in exports("outputs/c").items()}
    assert exports("outputs/tiny-2") == by_hand

    written = json.loads((tmp_path / "outputs/tiny-2/stages.json").read_text())
    assert [one["stage"] for one in written["stages"]] == ["1 captions", "2 images", "3 captions"]
    last = json.loads((tmp_path / f"outputs/tiny-2/{THIRD}/summary.json").read_text())["after"]
    assert {name: row[-1] for name, row in written["metrics"].items()} == last
    table = said.splitlines()[-len(last) - 1 :]
    assert table[0].split("  ")[-4:] == ["   start", "1 captions", "2 images", "3 captions"]
    assert max(map(len, table)) <= 100
    assert (tmp_path / "outputs/tiny-2/stages.md").read_text().startswith("| metric | start | 1 captions | 2 images | 3 captions |\n")
    assert Image.open("outputs/tiny-2/stages.png").width == 5 * (TILE + GAP)


def test_full_finetuning_in_stages(fit, tmp_path):
    (tmp_path / "full.yaml").write_text("model: {init_args: {image_finetune: {class_path: uae.models.finetune.Full}}}")
    stages = in_stages()
    stages[2] = stages[2].replace(" ", " full.yaml ", 1)
    fit(f"--config={ROOT / 'configs/finetune/full.yaml'}", *stages)
    assert_chained("outputs/tiny", "model.safetensors", "diffusion_pytorch_model.safetensors")


def test_merged_adapters_in_stages_are_whole_weights(fit, tmp_path):
    callbacks = [one | ({"init_args": {"merge": True}} if "Export" in one["class_path"] else {}) for one in CALLBACKS]
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    fit("--config=merge.yaml", *in_stages())
    assert_chained("outputs/tiny", "model.safetensors", "diffusion_pytorch_model.safetensors")


def test_one_network_has_one_adapter_with_the_factors_of_both_halves(fit, tmp_path):
    finetune = "--model.init_args.finetune.init_args"
    fit(f"{finetune}.target_modules=all-linear", f"{finetune}.rank=2", *in_stages(), base="tiny_janus", delta=None)
    assert_continuous("outputs/tiny_janus")
    assert {Path(name).parent.name for name in exports("outputs/tiny_janus")} == {"export"}
    assert len(set(exports("outputs/tiny_janus").values())) == 3


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.mark.parametrize(("train", "what"), [("images", fail), ("captions", ask), ("images", ask)], ids=["error", "early", "signal"])
def test_what_is_continued_ends_like_what_was_never_stopped(fit, never_stopped, monkeypatch, tmp_path, capsys, train, what):
    """The longer first stage is not trained again; the one that was stopped goes on; the next ones start."""
    words = ["--trainer.max_steps=4", *in_stages()]
    if not (never_stopped / "outputs").exists():
        monkeypatch.chdir(never_stopped)
        (never_stopped / "few.yaml").write_text((tmp_path / "few.yaml").read_text())
        fit(*words)
        monkeypatch.chdir(tmp_path)
    Fault.at, Fault.what = (train, 2), what
    if what is fail:
        with pytest.raises(RuntimeError, match="the machine is gone"):
            fit(*words)
    else:
        capsys.readouterr()
        fit(*words)
        stage = 1 if train == "captions" else 2
        assert capsys.readouterr().out.endswith(
            f"stopped in stage {stage} of 3: the same command with --ckpt_path last goes on\n"
        )
    assert not (tmp_path / "outputs/tiny" / THIRD).exists()
    fit(*words, "--ckpt_path=last")
    assert exports("outputs") == exports(never_stopped / "outputs")
    assert [folder.name for folder in Path("outputs").iterdir()] == ["tiny"]
    assert json.loads(Path("outputs/tiny/stages.json").read_text())["metrics"] == pytest.approx(
        json.loads((never_stopped / "outputs/tiny/stages.json").read_text())["metrics"]
    )


def test_a_request_that_comes_after_the_last_step_of_a_stage_stops_the_next(fit, tmp_path):
    Fault.at, Fault.what = ("captions", 2), ask
    fit(*in_stages())
    assert (tmp_path / "outputs/tiny/export").exists()  # this stage had ended
    assert not (tmp_path / "outputs/tiny" / SECOND).exists()
    fit(*in_stages(), "--ckpt_path=last")
    assert (tmp_path / "outputs/tiny" / THIRD / "export").exists()


def test_a_dry_run_tries_all_stages_and_leaves_nothing(fit, tmp_path, capsys):
    fit(*in_stages(), "--trainer.fast_dev_run=true")
    assert capsys.readouterr().out.count("stage ") == 3
    assert not (tmp_path / "outputs").exists()


ADAPTER = "--model.init_args.finetune.init_args.adapter"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--stage="], "--stage '' (stage 1) names no configuration file"),
        (["--stage"], "--stage '' (stage 1) names no configuration file"),
        ([f"--stage={CAPTIONS}", "--stage=nowhere.yaml"], "(stage 2): there is no file 'nowhere.yaml'"),
        ([f'--stage={CAPTIONS} "'], "cannot be read (No closing quotation)"),
        ([f"--stage={CAPTIONS} --run_name=x"], "--run_name is of the whole command"),
        ([f"--stage={CAPTIONS}", f"--stage={IMAGES} --trainer.max_step 3"], "trainer.max_step"),
        ([f"--stage={CAPTIONS}", "--ckpt_path=x.ckpt"], "--ckpt_path x.ckpt with --stage; allowed: last"),
        ([f"--stage={CAPTIONS}", "--print_plan"], "--print_plan is of one run"),
        ([f"--stage={CAPTIONS}", f"--stage={ROOT}/configs/stages/cold_start_captions.yaml"], "stage 2 has model.class_path=uae.coldstart"),
        ([f"--stage={CAPTIONS} {ROOT}/tests/equivalence.yaml", f"--stage={IMAGES}"], "stage 1 exports nothing that the next could"),
        ([f"--stage={CAPTIONS}", f"--stage={CAPTIONS} {ADAPTER}=a"], f"stage 2 has {ADAPTER[2:]}=a, but starts from what stage 1"),
        (
            [f"--stage={CAPTIONS}", f"--stage={CAPTIONS} {ROOT}/configs/finetune/full.yaml"],
            "stage 2 has model.init_args.finetune=uae.models.finetune.Full, which starts from whole weights, but stage 1 exports an adapter",
        ),
        ([f"--stage={CAPTIONS} dirpath.yaml"], "dirpath='kept' of callbacks.checkpoint.RolloutCheckpoint would be that of every stage"),
        ([f"--stage={CAPTIONS} folder.yaml"], "folder='kept' of callbacks.export.Export would be that of every stage"),
    ],
)  # fmt: skip
def test_what_could_only_fail_later_is_refused_before_anything_is_trained(fit, tmp_path, capsys, words, line):
    for name, callback in (("dirpath", CALLBACKS[5]), ("folder", CALLBACKS[3])):
        given = {**callback, "init_args": {name: "kept"}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [given]}}))
    with pytest.raises(SystemExit, match="2"):
        fit(*words)
    (said,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert line in said
    assert not (tmp_path / "outputs").exists()


def test_stages_are_of_fit(fit, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["test", f"--config={ROOT}/configs/tiny.yaml", f"--stage={CAPTIONS}"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --stage is an option of fit on the command line")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["fit", "--help"])
    assert "--stage" in capsys.readouterr().out


def two(rank, folder):
    os.chdir(folder)
    words = [f"--config={ROOT / file}" for file in ("configs/tiny.yaml", "configs/debug/fast.yaml", "tests/untrained.yaml")]
    words += ["--config=few.yaml", f"--config={ROOT}/configs/debug/two_cpu_processes.yaml", "--data.init_args.train_size=32"]
    cli.main(["fit", *words, *in_stages()])
    return Path.cwd().name


def test_two_processes_go_through_all_stages_together(fit, tmp_path):
    run_on_two(two, str(tmp_path), timeout=100)
    assert_chained("outputs/tiny", "adapter_model.safetensors", "adapter_model.safetensors")
    assert (tmp_path / "outputs/tiny/stages.png").is_file()
