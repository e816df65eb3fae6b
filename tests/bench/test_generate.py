import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from uae.bench import generate
from uae.bench.dpg import command as dpg
from uae.bench.generate import Drawing, DrawingJob, draw_missing, save, seeds_of, split_options
from uae.bench.geneval import command as geneval
from uae.bench.system import load
from uae.checkpoints.files import METADATA, VERSION
from uae.checkpoints.shards import INDEX
from uae.checkpoints.trainable import trainable_state

ROOT = Path(__file__).parents[2]
RANDOM = ["--config", str(ROOT / "configs/tiny.yaml"), "--config", str(ROOT / "tests/untrained.yaml")]
TEXTS = ["a red ring", "a blue square and a tiny pink cross", "a large cyan triangle at top left"]


@pytest.fixture(scope="module")
def system():
    return load(RANDOM, "cpu")


@pytest.fixture
def prompts(tmp_path):
    rows = [{"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": text} for text in TEXTS]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def job(folder, texts=TEXTS, seeds=1, **changes):
    drawings = [Drawing(folder / f"{i}.png", text, seeds_of(0, i, seeds)) for i, text in enumerate(texts)]
    return DrawingJob(folder, drawings, {"seed": 0}, **changes)


def pixels(folder):
    return {path.relative_to(folder).as_posix(): np.array(Image.open(path)).astype(int) for path in folder.rglob("*.png")}


def equal(a, b):
    """Batches of other sizes may round a level differently."""
    return a.keys() == b.keys() and all(np.abs(a[name] - b[name]).max() <= 1 for name in a)


# --------------------------------------------------------------------------------------------------- what is drawn


def test_images_depend_on_prompt_and_seed_alone(system, tmp_path):
    draw_missing(system, job(tmp_path / "whole", seeds=1, batch_size=8))
    draw_missing(system, job(tmp_path / "single", seeds=1, batch_size=1))
    whole = pixels(tmp_path / "whole")
    assert equal(whole, pixels(tmp_path / "single"))
    for part in ("2/2", "1/2"):
        draw_missing(system, job(tmp_path / "parts", part=part))
        assert len(pixels(tmp_path / "parts")) == {"2/2": 1, "1/2": 3}[part]
    assert equal(whole, pixels(tmp_path / "parts"))
    condition = system.umm.conditioner.encode(TEXTS)
    expected = system.umm.renderer.render(condition, [seeds_of(0, i, 1)[0] for i in range(3)])
    for i in range(3):
        assert np.abs(whole[f"{i}.png"] - (expected[i] * 255).permute(1, 2, 0).numpy()).max() <= 1.01


def test_a_grid_is_row_by_row(system, tmp_path):
    draw_missing(system, job(tmp_path / "grid", seeds=4, batch_size=3))
    tiles = DrawingJob(tmp_path / "tiles", [Drawing(tmp_path / f"tiles/{i}_{k}.png", text, seeds_of(0, i, 1, first=k))
                                     for i, text in enumerate(TEXTS) for k in range(4)], {"seed": 0})  # fmt: skip
    draw_missing(system, tiles)
    grid, single = pixels(tmp_path / "grid"), pixels(tmp_path / "tiles")
    for i in range(3):
        rows = [np.concatenate([single[f"{i}_{k}.png"] for k in row], 1) for row in ((0, 1), (2, 3))]
        assert np.abs(grid[f"{i}.png"] - np.concatenate(rows, 0)).max() <= 1
    assert np.abs(single["0_0.png"] - single["0_1.png"]).max() > 1  # other seeds, other images
    with pytest.raises(ValueError, match="3 pictures make no square grid"):
        save([torch.zeros(3, 2, 2)] * 3, tmp_path / "x.png")


def test_layouts(system, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load", lambda words, device: system)
    geneval.main(["generate", "--prompts", prompts, "--images", str(tmp_path / "g"), "--samples", "2", *RANDOM])
    names = {f"{i:05d}/samples/{k:04d}.png" for i in range(3) for k in range(2)}
    assert pixels(tmp_path / "g").keys() == names
    assert [json.loads((tmp_path / f"g/{i:05d}/metadata.jsonl").read_text())["prompt"] for i in range(3)] == TEXTS
    before = {name: (tmp_path / "g" / name).stat().st_mtime_ns for name in names}
    geneval.main(["generate", "--prompts", prompts, "--images", str(tmp_path / "g"), "--samples", "3", *RANDOM])  # more of them
    assert {name: (tmp_path / "g" / name).stat().st_mtime_ns for name in names} == before
    assert len(pixels(tmp_path / "g")) == 9
    (tmp_path / "texts").mkdir()
    for name, text in zip(("a", "b.c", "d"), TEXTS, strict=True):
        (tmp_path / f"texts/{name}.txt").write_text(f"{text}\n")
    dpg.main(["generate", "--prompts", str(tmp_path / "texts"), "--images", str(tmp_path / "d"), *RANDOM])
    drawn = pixels(tmp_path / "d")
    assert {name: image.shape for name, image in drawn.items()} == dict.fromkeys(("a.png", "b.c.png", "d.png"), (48, 48, 3))


def test_another_system_or_other_prompts_do_not_mix(system, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load", lambda words, device: system)
    words = ["generate", "--prompts", prompts, "--images", str(tmp_path / "g"), "--samples", "1", *RANDOM]
    geneval.main(words)
    with pytest.raises(ValueError, match="they differ in seed, see drawn_by.json"):
        geneval.main([*words, "--seed", "1"])
    other = load([*RANDOM, "--model.init_args.system.init_args.denoising_steps", "1"], "cpu")
    monkeypatch.setattr(generate, "load", lambda words, device: other)
    with pytest.raises(ValueError, match="differ in model.init_args.system.init_args.denoising_steps"):
        geneval.main(words)
    for text in TEXTS:
        Path(prompts).write_text(Path(prompts).read_text().replace(text, f"{text}!"))
    monkeypatch.setattr(generate, "load", lambda words, device: system)
    with pytest.raises(ValueError, match="holds images of other prompts.*'a red ring', asked for is 'a red ring!'"):
        geneval.main(words)


def test_what_changed_is_drawn_again_and_what_is_gone_is_set_aside(system, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "load", lambda words, device: system)
    texts, folder = tmp_path / "texts", tmp_path / "d"
    texts.mkdir()
    words = ["generate", "--prompts", str(texts), "--images", str(folder), "--tiles", "1", *RANDOM]
    for name, text in zip("abc", TEXTS, strict=True):
        (texts / f"{name}.txt").write_text(text)
    dpg.main(words)
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    old = pixels(folder)
    (texts / "README.md").write_text("no prompt")
    (texts / "a.txt").write_text("a large pink circle")
    (texts / "b.txt").unlink()
    (texts / "d.txt").write_text(TEXTS[0])
    dpg.main(words)
    said = capsys.readouterr().out
    assert "1 images moved to" in said
    assert "2 images drawn (1 again, since their prompts have changed), 1 were there" in said
    assert {file.name for file in folder.glob("*.png")} == {"a.png", "c.png", "d.png"}
    assert np.array_equal(np.array(Image.open(folder / ".gone/b.png")), old["b.png"])
    assert (folder / "c.png").stat().st_mtime_ns == before["c.png"]
    assert not np.array_equal(pixels(folder)["a.png"], old["a.png"])
    assert list(dpg.find_grids(folder, 24, 1)) == ["a", "c", "d"]


def test_images_of_nobody_knows_whom_are_not_taken_for_the_systems(system, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load", lambda words, device: system)
    foreign = tmp_path / "g/00001/samples/0000.png"
    foreign.parent.mkdir(parents=True)
    Image.new("RGB", (24, 24)).save(foreign)
    with pytest.raises(ValueError, match=r"00001/samples/0000.png exists, but .*g has no drawn_by.json"):
        geneval.main(["generate", "--prompts", prompts, "--images", str(tmp_path / "g"), "--samples", "1", *RANDOM])
    assert [file for file in (tmp_path / "g").rglob("*") if file.is_file()] == [foreign]


# --------------------------------------------------------------------------------------------------- interruptions


def test_an_interrupted_drawing_goes_on(system, tmp_path, monkeypatch):
    whole, torn = job(tmp_path / "whole", seeds=4, batch_size=2), job(tmp_path / "torn", seeds=4, batch_size=2)
    draw_missing(system, whole)
    render, calls = system.umm.renderer.render, []

    def dies(condition, seeds):
        calls.append(len(seeds))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return render(condition, seeds)

    monkeypatch.setattr(system.umm.renderer, "render", dies)
    with pytest.raises(KeyboardInterrupt):
        draw_missing(system, torn)
    assert list(pixels(tmp_path / "torn")) == ["0.png"]  # two batches make a grid; the third's half grid is not there
    draw_missing(system, torn)
    assert sum(calls) - 2 == 12 + 2  # what died, and the half of a grid that went with it, again; nothing else
    assert equal(pixels(tmp_path / "torn"), pixels(tmp_path / "whole"))


@pytest.mark.slow
def test_a_killed_process_loses_no_finished_image(system, prompts, tmp_path, monkeypatch):
    Path(prompts).write_text(Path(prompts).read_text() * 10)
    words = ["generate", "--prompts", prompts, "--images", str(tmp_path / "g"), "--batch_size", "2", *RANDOM]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "uae.bench", "geneval", *words, "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and len(list((tmp_path / "g").rglob("*.png"))) < 8 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "g").rglob("[0-9]*.png")}
    assert 8 <= len(finished) < 120
    for path in finished:
        Image.open(path).load()
    monkeypatch.setattr(generate, "load", lambda words, device: system)
    geneval.main(words)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(list((tmp_path / "g").rglob("[0-9]*.png"))) == 120


# --------------------------------------------------------------------------------------------------------- systems


def test_checkpoints_of_both_kinds_are_read(system, tmp_path):
    weights = {name: torch.full_like(parameter, 0.25) for name, parameter in system.module.named_parameters() if "lora_" in name}
    run = {VERSION: "2.6"}
    torch.save({"state_dict": weights, **run}, tmp_path / "a.ckpt")
    dcp.save({"state_dict": weights}, checkpoint_id=tmp_path / "shards", no_dist=True)
    torch.save(run, tmp_path / "shards" / METADATA)
    for path in ("a.ckpt", "shards"):
        read = load([*RANDOM, "--ckpt_path", str(tmp_path / path)], "cpu")
        state = read.module.state_dict()
        assert all((state[name] == 0.25).all() for name in weights)
        assert read.identity["checkpoint"] != system.identity["checkpoint"]
        assert not trainable_state(read.module, state)  # frozen
    weights.popitem()
    torch.save({"state_dict": weights, **run}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="1 missing"):
        load([*RANDOM, "--ckpt_path", str(tmp_path / "b.ckpt")], "cpu")
    with pytest.raises(FileNotFoundError, match="correct ckpt_path"):
        load([*RANDOM, "--ckpt_path", str(tmp_path / "c.ckpt")], "cpu")
    (tmp_path / "shards" / INDEX).write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(ValueError, match="which could run code"):
        load([*RANDOM, "--ckpt_path", str(tmp_path / "shards")], "cpu")


def test_precision_is_part_of_a_system_and_never_ignored():
    def precise(name):
        return load([*RANDOM, "--trainer.precision", name], "cpu")

    assert precise("bf16").identity == precise("bf16-mixed").identity != precise("32-true").identity
    with precise("bf16").precision():
        assert torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match=r"trainer.precision=bf16-true; allowed where no trainer runs: 32-true, bf16-mixed, 16-mixed"):
        precise("bf16-true")


def test_what_cannot_draw_is_refused():
    with pytest.raises(ValueError, match="ColdStart neither captions nor draws"):
        load(["--config", str(ROOT / "configs/pretrain/clip.yaml")], "cpu")


@pytest.mark.parametrize(
    ("words", "own", "system"),
    [
        (["--config", "a", "--images", "b", "--x.y=3"], ["--images", "b"], ["--config", "a", "--x.y=3"]),
        (["--images=b", "--seed_everything", "3", "--seed", "1"], ["--images=b", "--seed", "1"], ["--seed_everything", "3"]),
        (["--help"], ["--help"], []),
        (["--images"], ["--images"], []),
    ],
)
def test_options_go_to_whom_they_belong(words, own, system):
    assert split_options(words, {"--images", "--seed"}) == (own, system)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --config FILE"),
        (["--config", "x.yaml", "--part", "3/2"], "--part 3/2: allowed: i/n"),
        (["--config", "x.yaml", "--batch_size", "0"], "--batch_size 0"),
        (["--config", "x.yaml", "--samples", "0"], "--samples 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(prompts, tmp_path, words, said, monkeypatch):
    monkeypatch.setattr(generate, "load", lambda words, device: None)
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        geneval.main(["generate", "--prompts", prompts, "--images", str(tmp_path / "g"), *words])


def test_two_prompts_of_one_name_are_refused(system, tmp_path):
    twice = [Drawing(tmp_path / "a.png", text, (0,)) for text in TEXTS]
    with pytest.raises(ValueError, match="two prompts would be drawn to"):
        draw_missing(system, DrawingJob(tmp_path, twice, {}))
