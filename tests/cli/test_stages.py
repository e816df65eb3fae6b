"""Several stages by one command: what each starts from, what all of them leave, and what ends them on the way."""

import contextlib
import io
import itertools
import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback
from PIL import Image

from tests.two_processes import run_on_two
from uae import cli
from uae.files.tiles import GAP, TILE

ROOT = Path(__file__).parents[2]
CAPTIONS = f"{ROOT}/configs/stages/generation_for_understanding.yaml"
IMAGES = f"{ROOT}/configs/stages/understanding_for_generation.yaml"
COLD = f"{ROOT}/configs/stages/cold_start_captions.yaml"
SECOND, THIRD = "2-understanding_for_generation", "3-generation_for_understanding"
TWICE = "--model.init_args.reconstructions 2"
STAGES = [f"--stage={CAPTIONS}", f"--stage={IMAGES} {TWICE}", f"--stage={CAPTIONS}"]
CALLBACKS = [
    {"class_path": "tests.cli.test_stages.Fault"},
    {"class_path": "callbacks.summary.Summary"},
    {"class_path": "callbacks.examples.Examples", "init_args": {"images": 2}},
    {"class_path": "callbacks.export.Export"},
    {"class_path": "callbacks.preemption.Preemption"},
    {"class_path": "callbacks.checkpoint.RolloutCheckpoint", "init_args": {"every_n_train_steps": 1, "save_last": "link"}},
]
TRAINER = {"callbacks": CALLBACKS, "max_steps": 2, "logger": False, "val_check_interval": None}


class Fault(Callback):
    """Fails, or sends a signal, after so many steps of a stage that trains captions, or images."""

    at: tuple[str, int] | None = None
    what: object = None

    def on_train_batch_start(self, trainer, module, *_):
        if Fault.at == (module.plan.train, trainer.global_step):
            Fault.at = None
            Fault.what()


def crash():
    raise KeyError("the machine is gone")


def ask():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Runs ``fit`` in a folder."""

    def run(folder, *words, base="tiny", delta="tests/untrained.yaml"):
        few = {"trainer": TRAINER, "data": {"init_args": {"val_size": 2, "train_size": 16, "eval_batch_size": 2}}}
        few["model"] = {"init_args": {"mini_batches": 1, "group": 2, "image_lr": 0.02}}
        (folder / "few.yaml").write_text(yaml.safe_dump(few))
        files = [f"configs/{base}.yaml", "configs/debug/fast.yaml", *([delta] if delta else [])]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("sys.argv", ["uae"])
            return cli.main(["fit", *(f"--config={ROOT / file}" for file in files), "--config=few.yaml", *words])

    return run


@pytest.fixture(scope="module")
def chain(start, tmp_path_factory):
    """The folder of a chain of captions, images, captions, and what it said. Another run has its name."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "outputs/tiny").mkdir(parents=True)
    (folder / "outputs/tiny/run.json").write_text(json.dumps({"run_name": "tiny", "labels": "", "started": ""}))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        start(folder, *STAGES)
    return folder / "outputs/tiny-2", said.getvalue()


@pytest.fixture
def fit(start, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield partial(start, tmp_path)
    Fault.at = None
    for number, handler in handlers.items():
        signal.signal(number, handler)


def exports(folder):
    """The bytes of all exported weights, by file."""
    folder = Path(folder)
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("**/export/**/*.safetensors"))}


def assert_chained(folder, stages=("", f"{SECOND}/", f"{THIRD}/")):
    """Each stage starts where the one before ended, changes what it trains, and hands the other half on byte by byte."""
    captions = [(_weights(Path(folder, stage, "export"))) for stage in stages]
    images = [(_weights(Path(folder, stage, "export/renderer"))) for stage in stages[1:]]
    assert captions[0] == captions[1] not in captions[2:]
    assert len(set(images)) == 1
    assert not Path(folder, "export/renderer").exists()
    summaries = [json.loads(Path(folder, stage, "summary.json").read_text()) for stage in stages]
    for one, after in itertools.pairwise(summaries):
        assert one["after"] == pytest.approx(after["before"], abs=1e-6)


def _weights(folder):
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def test_each_stage_goes_on_from_the_one_before(chain):
    folder, said = chain
    assert_chained(folder)
    assert f"stage 2 of 3: {IMAGES}\nresults: outputs/tiny-2/{SECOND}\n" in said
    written, last = (json.loads((folder / file).read_text()) for file in ("stages.json", f"{THIRD}/summary.json"))
    assert [one["stage"] for one in written["stages"]] == ["1 captions", "2 images", "3 captions"]
    assert {name: row[-1] for name, row in written["metrics"].items()} == last["after"]
    lines = said.splitlines()
    end = next(n for n, line in enumerate(lines) if line.startswith("folder: outputs/tiny-2 (stages.md"))
    table = lines[end - len(last["after"]) - 1 : end]
    assert table[0].split() == ["start", "1", "captions", "2", "images", "3", "captions"]
    assert max(map(len, table)) <= 100
    assert (folder / "stages.md").read_text().startswith("| metric | start | 1 captions | 2 images | 3 captions |\n")
    with Image.open(folder / "stages.png") as picture:
        assert picture.width == 5 * (TILE + GAP)


def test_a_chain_is_what_a_user_does_by_hand(chain, fit):
    key = "--model.init_args."
    fit("--run_name=a", f"--config={CAPTIONS}")
    fit("--run_name=b", f"--config={IMAGES}", *TWICE.split(), f"{key}finetune.init_args.adapter=outputs/a/export")
    fit(
        "--run_name=c", f"--config={CAPTIONS}", f"{key}finetune.init_args.adapter=outputs/b/export",
        f"{key}image_finetune=uae.models.finetune.LoRA", f"{key}image_finetune.init_args.adapter=outputs/b/export/renderer",
    )  # fmt: skip
    by_hand = exports("outputs/a")
    for stage, run in ((SECOND, "b"), (THIRD, "c")):
        by_hand |= {f"{stage}/{name}": content for name, content in exports(f"outputs/{run}").items()}
    assert exports(chain[0]) == by_hand


def test_whole_weights_go_from_stage_to_stage(fit, tmp_path):
    """A merged adapter, then the decoder in full, then the captioner in full."""
    callbacks = [one | ({"init_args": {"merge": True}} if "Export" in one["class_path"] else {}) for one in CALLBACKS]
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    (tmp_path / "full.yaml").write_text("model: {init_args: {image_finetune: {class_path: uae.models.finetune.Full}}}")
    full = ROOT / "configs/finetune/full.yaml"
    fit("--config=merge.yaml", f"--stage={CAPTIONS}", f"--stage={IMAGES} full.yaml {TWICE}", f"--stage={CAPTIONS} {full}")
    assert_chained("outputs/tiny")
    assert (tmp_path / f"outputs/tiny/{THIRD}/export/renderer/config.json").is_file()


def test_one_network_has_one_adapter_with_the_factors_of_both_halves(fit):
    finetune = "--model.init_args.finetune.init_args"
    words = [f"{finetune}.target_modules=all-linear", f"{finetune}.rank=2", *STAGES[:2]]
    fit(*words, base="tiny_janus", delta=None)
    before, after = (json.loads(Path("outputs/tiny_janus", stage, "summary.json").read_text()) for stage in ("", SECOND))
    assert before["after"] == pytest.approx(after["before"], abs=1e-6)
    assert len(set(exports("outputs/tiny_janus").values())) == len(exports("outputs/tiny_janus")) == 2


def test_what_is_continued_ends_like_what_was_never_stopped(chain, fit, tmp_path):
    """The first stage is not trained again, the second goes on inside, the third starts."""
    Fault.at, Fault.what = ("images", 1), crash
    with pytest.raises(KeyError, match="the machine is gone"):
        fit(*STAGES)
    assert not (tmp_path / "outputs/tiny" / THIRD).exists()
    fit(*STAGES, "--ckpt_path=last")
    assert exports("outputs/tiny") == exports(chain[0])
    assert [folder.name for folder in Path("outputs").iterdir()] == ["tiny"]
    written, expected = (json.loads(Path(one, "stages.json").read_text())["metrics"] for one in ("outputs/tiny", chain[0]))
    assert written == expected


@pytest.mark.parametrize("step", [0, 1])
def test_a_request_to_stop_ends_the_chain(fit, tmp_path, capsys, step):
    """Inside a stage, and in its last step, when it has nothing left but its end."""
    Fault.at, Fault.what = ("captions", step), ask
    fit(*STAGES)
    assert capsys.readouterr().out.endswith("stopped in stage 1 of 3: the same command with --ckpt_path last goes on\n")
    assert (tmp_path / "outputs/tiny/export").exists() == (step == 1)
    assert not (tmp_path / "outputs/tiny" / SECOND).exists()


def test_a_dry_run_tries_all_stages_and_leaves_nothing(fit, tmp_path, capsys):
    fit(*STAGES[:2], "--trainer.fast_dev_run=true")
    assert capsys.readouterr().out.count("stage ") == 2
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
        ([f"--stage={CAPTIONS}", f"--stage={COLD}"], "stage 2 has model.class_path=uae.coldstart"),
        ([f"--stage={CAPTIONS} {ROOT}/tests/equivalence.yaml", f"--stage={IMAGES}"], "stage 1 exports nothing that the next could"),
        ([f"--stage={CAPTIONS}", f"--stage={CAPTIONS} {ADAPTER}=a"], f"stage 2 has {ADAPTER[2:]}=a, but starts from what stage 1"),
        (
            [f"--stage={CAPTIONS}", f"--stage={CAPTIONS} {ROOT}/configs/finetune/full.yaml"],
            "stage 2 has model.init_args.finetune=uae.models.finetune.Full, which starts from whole weights, but stage 1 exports",
        ),
        ([f"--stage={CAPTIONS} dirpath.yaml"], "dirpath='kept' of callbacks.checkpoint.RolloutCheckpoint would be that of"),
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
    cli.main(["fit", *words, "--config=few.yaml", f"--config={ROOT}/configs/debug/two_cpu_processes.yaml", *STAGES[:2]])


@pytest.mark.slow
def test_two_processes_go_through_all_stages_together(start, tmp_path):
    with pytest.raises(SystemExit):
        start(tmp_path, "--stage=")  # writes the configuration
    run_on_two(two, str(tmp_path), timeout=150)
    assert_chained(tmp_path / "outputs/tiny", ("", f"{SECOND}/"))
    assert (tmp_path / "outputs/tiny/stages.png").is_file()
