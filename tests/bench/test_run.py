import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image

from callbacks.predictions import finished
from uae.bench.__main__ import main
from uae.bench.result import read_result
from uae.bench.score.pairs import pair
from uae.files.folders import shown
from uae.miniature.scenes import render, scene_of
from uae.miniature.tiny import WEIGHTS
from uae.weights.checksums import checksums

ROOT = Path(__file__).parents[2]
FILES = ("configs/tiny.yaml", "configs/debug/fast.yaml", "tests/untrained.yaml")
SCORE = ["--encoders", str(ROOT / "configs/bench/tiny.yaml"), "--cache", "false"]
SYSTEM = [word for file in FILES for word in ("--config", str(ROOT / file))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for i, name in enumerate(["b.png", "a.jpg", "a.png", "deep/c.webp", "deep/d.png", "e.png"]):
        (folder / name).parent.mkdir(exist_ok=True)
        to_pil_image(render([scene_of(i, "test", 0, (1, 2))])[0]).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def reconstruct(sources, tmp_path, monkeypatch):
    """Run the command into a folder of that name; its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])

    def run(output, *words):
        options = ["--sources", sources, "--output", tmp_path / output, "--image_size", 24, "--batch_size", 1]
        main(["run", *SYSTEM, *map(str, [*options, *words])])
        return tmp_path / output

    return run


def pictures(folder):
    return {file.relative_to(folder).as_posix(): np.array(Image.open(file)).astype(int) for file in folder.rglob("[!.]*.png")}


def test_a_folder_becomes_captions_and_reconstructions_that_can_be_scored(reconstruct, sources, tmp_path, capsys):
    made = reconstruct("ours")
    said = capsys.readouterr().out
    assert "7 images: 0 done, 6 to do, 1 unreadable" in said
    assert "* unreadable: broken.png" in said
    rows = json.loads((made / "captions.json").read_text())
    assert [row["name"] for row in rows] == ["a.jpg", "a.png", "b.png", "deep/c.webp", "deep/d.png", "e.png"]
    assert sorted(pictures(made)) == ["a.jpg.png", "a.png", "b.png", "deep/c.webp.png", "deep/d.png", "e.png"]
    encoders = ["--encoders", str(ROOT / "configs/bench/tiny.yaml"), "--cache", "false"]
    result = tmp_path / "result.json"
    main(["score", "--sources", str(sources), "--reconstructions", str(made), "--output", str(result), *encoders])
    assert read_result(result)["scores"]["overall"]["n"] == 6
    assert read_result(result)["left_out"]["unmatched_sources"] == ["broken.png"]


def test_killed_and_started_again_it_loses_nothing_and_repeats_nothing(reconstruct, sources, tmp_path, capsys):
    whole = reconstruct("whole")
    options = ["--sources", sources, "--output", tmp_path / "ours", "--image_size", 24, "--batch_size", 1]
    words = [*SYSTEM, *map(str, options), "--trainer.callbacks+=tests.bench.judging.killer.Killer"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-m", "uae.bench", "run", *words], cwd=tmp_path, env=environment, capture_output=True, timeout=100
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    ours = tmp_path / "ours"
    before = finished(ours)
    assert len(before) == 3
    assert not (ours / "captions.json").exists()
    written = {name: (ours / row["reconstruction"]).stat().st_mtime_ns for name, row in before.items()}
    lines = ours / "captions.rank0.jsonl"
    lines.write_text(lines.read_text() + '{"name": "e.png", "recons')  # as if the row were torn, too

    capsys.readouterr()
    reconstruct("ours")
    assert "7 images: 3 done, 3 to do, 1 unreadable" in capsys.readouterr().out
    after = finished(ours)
    assert len(after) == 6
    assert all((ours / after[name]["reconstruction"]).stat().st_mtime_ns == time for name, time in written.items())
    rows, expected = (json.loads((folder / "captions.json").read_text()) for folder in (ours, whole))
    assert [(row["name"], row["caption"]) for row in rows] == [(row["name"], row["caption"]) for row in expected]
    names = [json.loads(line)["name"] for line in lines.read_text().splitlines() if line.endswith("}")]
    assert len(names) == len(set(names)) == 6
    drawn, by_whole = pictures(ours), pictures(whole)
    assert drawn.keys() == by_whole.keys()
    assert all(np.abs(drawn[name] - by_whole[name]).max() <= 1 for name in drawn)

    stamp = {file: file.stat().st_mtime_ns for file in ours.rglob("*.png")}
    reconstruct("ours")  # nothing is left to do
    assert {file: file.stat().st_mtime_ns for file in ours.rglob("*.png")} == stamp
    assert "6 captions and reconstructions" in capsys.readouterr().out


def test_a_folder_is_of_one_system(reconstruct, capsys):
    made = reconstruct("ours")
    before = (made / "captions.json").read_text()
    for words, key in ((["--fit", "pad"], "reading.fit"), (["--model.init_args.validation_temperature", "1.0"], "temperature")):
        with pytest.raises(SystemExit, match="2"):
            reconstruct("ours", *words)
        assert key in capsys.readouterr().err
    assert (made / "captions.json").read_text() == before


def test_another_precision_is_another_system(reconstruct, capsys):
    reconstruct("ours")
    for words in (["--trainer.precision", "bf16-mixed"], ["--trainer.precision", "16"]):
        with pytest.raises(SystemExit, match="2"):
            reconstruct("ours", *words)
        said = capsys.readouterr().err
        assert "they differ in precision, see drawn_by.json" in said
    reconstruct("ours", "--trainer.precision", "32-true")  # what it was


def test_other_weights_behind_the_same_name_are_refused_even_if_nothing_is_left_to_do(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(tmp_path / "mirror"))
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mirror/owner/tiny"
    shutil.copytree(WEIGHTS, folder)
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(sources / "b.png", one)
    words = ["run", "--config", str(ROOT / "configs/tiny.yaml"), "--image_size", "24", "--sources", str(one)]
    words += ["--model.init_args.system.init_args.weights", str(folder), "--output", str(tmp_path / "ours")]
    main(words)
    file = folder / "decoder/projector.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file)
    (folder / "checksums.json").write_text(json.dumps(checksums(folder)))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert f"they differ in weights.{folder}, see drawn_by.json" in capsys.readouterr().err
    shutil.rmtree(folder)
    shutil.copytree(WEIGHTS, folder)
    main(words)
    assert "1 images: 1 done, 0 to do" in capsys.readouterr().out


def test_changed_sources_are_made_again_and_gone_ones_are_set_aside(reconstruct, sources, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(sources, images)
    made = reconstruct("ours", "--sources", images)
    rows = {row["name"]: row for row in json.loads((made / "captions.json").read_text())}
    before = {name: (made / row["reconstruction"]).stat().st_mtime_ns for name, row in rows.items()}
    lines = (made / "captions.rank0.jsonl").read_text()  # as if two processes had written them: the rows of one hide no newer ones
    (made / "captions.rank0.jsonl").unlink()
    (made / "captions.rank1.jsonl").write_text(lines)
    shutil.copy(sources / "e.png", images / "b.png")  # another picture under the same name
    os.utime(images / "b.png", ns=((sources / "b.png").stat().st_atime_ns, (sources / "b.png").stat().st_mtime_ns))
    (images / "deep/d.png").unlink()
    main(["score", "--sources", str(images), "--reconstructions", str(made), "--output", str(tmp_path / "r.json"), *SCORE])
    result = read_result(tmp_path / "r.json")
    assert result["left_out"]["changed"] == ["b.png"]
    assert result["scores"]["overall"]["n"] == 4
    capsys.readouterr()
    reconstruct("ours", "--sources", images)
    said = capsys.readouterr().out
    assert "6 images: 4 done, 1 to do, 1 unreadable" in said
    assert "* the source has changed, what was made of it goes to .gone: b.png" in said
    assert "* the source is gone, what was made of it goes to .gone: deep/d.png" in said
    after = {row["name"]: row for row in json.loads((made / "captions.json").read_text())}
    assert after.keys() == rows.keys() - {"deep/d.png"}
    assert after["b.png"]["source_sha256"] == rows["e.png"]["source_sha256"]
    assert after == {**{name: row for name, row in rows.items() if name != "deep/d.png"}, "b.png": after["b.png"]}
    assert pictures(made).keys() == {row["reconstruction"] for row in after.values()} | {".gone/b.png", ".gone/deep/d.png"}
    kept = after.keys() - {"b.png"}
    assert {name: (made / after[name]["reconstruction"]).stat().st_mtime_ns for name in kept} == {name: before[name] for name in kept}
    (images / "a.jpg").unlink()  # with nothing left to do, what is gone is dropped all the same
    reconstruct("ours", "--sources", images)
    assert "a.jpg" not in (made / "captions.json").read_text()
    assert not (made / "a.jpg.png").exists()


def test_every_source_has_a_file_of_its_own_that_is_found_again(reconstruct, sources, tmp_path):
    images = tmp_path / "images"
    latin = [os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"caf\xe8.png")]  # two names that are no UTF-8
    names = ["a.jpg", "a.jpg.png", "a.jpg.png.png", "b\\c.png", "b/c.png", "A.png", "a.png", *latin]
    for name, source in zip(names, ["b.png", "a.jpg", "a.png", "deep/c.webp", "deep/d.png", "e.png"] * 2, strict=False):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources / source, images / name)
    made = reconstruct("ours", "--sources", images, "--batch_size", 2)
    rows = {row["name"]: row["reconstruction"] for row in json.loads((made / "captions.json").read_text())}
    assert rows.keys() == {shown(name) for name in names}
    assert pictures(made).keys() == set(rows.values())
    assert len(set(rows.values())) == len(names)
    assert (rows["a.jpg"], rows["A.png"], rows["b/c.png"]) == ("a.jpg.png", "A.png", "b/c.png")
    assert pair(images, made).matched == {name: rows[shown(name)] for name in names}
    stamps = {file: file.stat().st_mtime_ns for file in made.rglob("*.png")}
    reconstruct("ours", "--sources", images)
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*.png")} == stamps


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda images, ours: (images / "x.png").mkdir() or shutil.copy(images / "b.png", images / "x.png/y.png"), None),
        (lambda images, ours: shutil.copytree(images / "deep", images / "a.jpg.png"), "to 'a.jpg.png', which must be a folder"),
        (lambda images, ours: ours.mkdir() or shutil.copy(images / "b.png", ours), "ours/b.png exists, but"),
        (lambda images, ours: ours.symlink_to(images), "are in each other; correct --output"),
    ],
    ids=["a folder like a picture", "a folder where a file goes", "files of somebody else", "the sources themselves"],
)
def test_no_file_that_is_there_is_overwritten(reconstruct, sources, tmp_path, capsys, prepare, said):
    images, ours = tmp_path / "images", tmp_path / "ours"
    shutil.copytree(sources, images)
    prepare(images, ours)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    if said is None:
        reconstruct("ours", "--sources", images)
    else:
        with pytest.raises(SystemExit, match="2"):
            reconstruct("ours", "--sources", images)
        assert said in capsys.readouterr().err
    assert all(file.read_bytes() == content for file, content in before.items())


@pytest.mark.slow
def test_two_processes_make_what_one_makes(reconstruct, sources, tmp_path):
    one = reconstruct("one")
    options = ["--sources", sources, "--output", tmp_path / "two", "--image_size", 24, "--batch_size", 2]
    parallel = ["--config", ROOT / "configs/debug/two_cpu_processes.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(
        [sys.executable, "-m", "uae.bench", "run", *SYSTEM, *map(str, [*parallel, *options])],
        cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    two = tmp_path / "two"
    assert len(list(two.glob("captions.rank*.jsonl"))) == 2
    rows, expected = (json.loads((folder / "captions.json").read_text()) for folder in (two, one))
    assert [(row["name"], row["caption"]) for row in rows] == [(row["name"], row["caption"]) for row in expected]
    drawn, alone = pictures(two), pictures(one)
    assert drawn.keys() == alone.keys()
    assert all(np.abs(drawn[name] - alone[name]).max() <= 1 for name in drawn)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sources", "nowhere"], "sources='nowhere' is not a folder"),
        (["--image_size", "0"], "--image_size 0: allowed: 1 or more"),
        (["--ckpt_path", "none.ckpt"], "no checkpoint at 'none.ckpt'"),
        (["--model.init_args.grup", "3"], "did you mean group"),
    ],
)
def test_mistakes_are_one_line(reconstruct, words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        reconstruct("ours", *words)
    assert said in capsys.readouterr().err


def test_a_run_that_never_began_leaves_the_folder_to_the_next(reconstruct, tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit, match="2"):
        reconstruct("ours", "--ckpt_path", tmp_path / "other.ckpt")
    assert "other.ckpt" in capsys.readouterr().err
    assert len(pictures(reconstruct("ours"))) == 6


def test_a_size_is_asked_for_where_none_is_configured_and_a_system_is_needed(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.chdir(tmp_path)
    options = ["--sources", str(sources), "--output", str(tmp_path / "ours")]
    for words, said in ((SYSTEM, "give --image_size"), ([], "give --config FILE")):
        with pytest.raises(SystemExit, match="2"):
            main(["run", *words, *options])
        assert said in capsys.readouterr().err
