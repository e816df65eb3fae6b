import json

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from callbacks.predictions import collect, file_name, json_lines
from tests.callbacks.conftest import ROOT
from uae.miniature.scenes import render, scene_of


def test_a_folder_is_captioned_and_drawn(command, tmp_path):
    names = ["a.png", "a.jpg", "deep/er/b.webp"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(render([scene_of(i, "test", 0, (1, 2))])[0]).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    words = ["--config", ROOT / "configs/data/folder.yaml", "--data.predict_root", tmp_path, "--data.num_workers", 0]
    finished = command("predict", *words, "--run_name", "folder", "--data.image_size", 24, "--data.batch_size", 2)
    written = command.folder / "outputs/folder/predict/predictions"
    rows = json.loads((written / "captions.json").read_text())
    assert [row["name"] for row in rows] == sorted(names)
    assert sorted(str(file.relative_to(written)) for file in written.rglob("*.png")) == [
        "a.jpg.png",
        "a.png",
        "deep/er/b.webp.png",
    ]
    module = finished.model
    for row in rows:  # one by one, by hand
        source = pil_to_tensor(Image.open(tmp_path / row["name"]).convert("RGB"))[None] / 255
        expected = module.predict_step({"image": source, "id": torch.tensor([row["id"]]), "name": [row["name"]]})
        assert row["caption"] == expected["caption"][0]
        assert row["reward"] == expected["reward"].item() or abs(row["reward"] - expected["reward"].item()) < 1e-5
        drawn = pil_to_tensor(Image.open(written / row["reconstruction"])) / 255
        assert (drawn - expected["reconstruction"][0].clamp(0, 1)).abs().max() < 2 / 255


def test_names_stay_inside_the_folder_and_apart():
    assert file_name("../../etc/x") == "etc/x.png"
    assert file_name("/abs/x.PNG") == "abs/x.PNG"
    assert len({file_name(name) for name in ("a.png", "a.jpg", "a", "b/a.png")}) == 4 - 1  # "a" and "a.png" are one file


def test_names_of_hostile_archives_are_harmless(tmp_path):
    names = ["..\\..\\x", "a\0b", "", "..", "/", "a//b", "\ud800", "n" * 5000 + "1", "n" * 5000 + "2", "é" * 300, "../" * 50 + "y"]
    files = [file_name(name) for name in names]
    assert files[-2].startswith("é" * 80)
    assert len({*files[-4:-2]}) == 2
    for file in files:
        target = (tmp_path / file).resolve()
        assert target.is_relative_to(tmp_path)
        assert target != tmp_path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"x")


@pytest.fixture
def predict(command, tmp_path):
    """Predict the scenes of some names."""

    def run(*names, words=()):
        root = tmp_path / f"images{len(names)}"
        for i, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(render([scene_of(i, "test", 0, (1, 2))])[0]).save(root / name, format="PNG")
        options = ["--config", ROOT / "configs/data/folder.yaml", "--data.predict_root", root, "--data.num_workers", 0]
        command("predict", *options, "--run_name", "again", "--data.image_size", 24, "--data.batch_size", 2, *words)

    return run


def test_predictions_of_two_runs_are_never_in_one_folder(command, predict, tmp_path, capfd):
    predict("a.png", "b.png", "c.png")
    predict("a.png", "d.png")
    for folder, names in (("predict", ["a.png", "b.png", "c.png"]), ("predict-2", ["a.png", "d.png"])):
        written = command.folder / "outputs/again" / folder / "predictions"
        assert sorted(file.name for file in written.rglob("*.png")) == names
        assert [row["name"] for row in json.loads((written / "captions.json").read_text())] == names
    given = ["--trainer.callbacks=callbacks.predictions.Predictions", "--trainer.callbacks.folder", str(tmp_path / "given")]
    predict("a.png", words=given)
    before = {file.name: file.read_bytes() for file in (tmp_path / "given").iterdir()}
    with pytest.raises(SystemExit):
        predict("d.png", words=given)
    assert "holds predictions of another run; allowed: an empty or new folder" in capfd.readouterr().err
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "given").iterdir()}


def test_two_images_of_one_file_are_named(tmp_path):
    rows = [{"name": name, "reconstruction": file_name(name), "caption": ""} for name in ("a", "a.png")]
    (tmp_path / "a.png").touch()
    for rank, row in enumerate(rows):  # two processes that did not know of each other
        (tmp_path / f"captions.rank{rank}.jsonl").write_bytes(json_lines([row]))
    with pytest.raises(ValueError, match=r"the images 'a' and 'a.png' would both be written to 'a.png'; rename one"):
        collect(tmp_path)


def test_captions_with_any_line_break_are_kept(tmp_path):
    rows = [{"name": name, "reconstruction": file_name(name), "caption": "a\u2028b\x85c"} for name in ("a.png", "caf\udce9.png")]
    for row in rows:
        (tmp_path / row["reconstruction"]).touch()
    (tmp_path / "captions.rank0.jsonl").write_bytes(json_lines(rows))
    assert collect(tmp_path) == rows
    assert json.loads((tmp_path / "captions.json").read_text()) == rows
