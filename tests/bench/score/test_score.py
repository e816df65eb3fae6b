import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from tests.bench.pictures import shapes, upright, write_all
from uae.bench.__main__ import main
from uae.bench.result import cases_of, read_result
from uae.bench.score import feature_cache
from uae.bench.score.comparison import check_comparable, paired_difference
from uae.bench.score.feature_cache import default_folder
from uae.encoders.preprocessing import Preprocessing
from uae.encoders.tower import Tower
from uae.metrics.intervals import bootstrap
from uae.rehearsal.encoders import ENCODERS

torch.set_num_threads(1)
ROOT = Path(__file__).parents[3]
OFFICIAL = {
    "clip": "openai/clip-vit-large-patch14",
    "longclip": "zer0int/LongCLIP-L-Diffusers",
    "dinov2": "facebook/dinov2-large",
    "dinov3": "facebook/dinov3-vitl16-pretrain-lvd1689m",
}


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """Tiny random encoders under the official names."""
    root = tmp_path_factory.mktemp("encoders")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in OFFICIAL.values():
            ENCODERS[name](root / name)
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sources of every kind, reconstructions of other sizes under other suffixes, and what must be left out."""
    root = tmp_path_factory.mktemp("images")
    names = write_all(root / "sources")
    (root / "ours").mkdir()
    for i, name in enumerate(names):
        Image.fromarray(shapes(30 + i, 41, 50 + i)).save(root / "ours" / f"{name}.png")
    whole = (root / "sources" / "odd.png").read_bytes()
    (root / "sources" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(root / "sources" / "odd.png", root / "ours" / "truncated.png")
    for name in ("lost_source.png", "no_image.png"):
        shutil.copy(root / "sources" / "grey.png", root / "sources" / name)
    (root / "ours" / "no_image.png").write_bytes(b"text")
    shutil.copy(root / "sources" / "grey.png", root / "ours" / "stray.png")
    return root


@pytest.fixture
def score(mirror, folders, tmp_path, monkeypatch):
    """Run the command on two folders; the result."""
    monkeypatch.setenv("UAE_CHECKPOINTS", str(mirror))

    def run(reconstructions="ours", *words, output="result.json", sources="sources", cache="cache"):
        target = tmp_path / output
        options = ["--sources", folders / sources, "--reconstructions", folders / reconstructions, "--output", target]
        main(["score", *map(str, [*options, "--cache_folder", tmp_path / cache, "--resamples", 200, *words])])
        return read_result(target)

    return run


@torch.no_grad()
def by_definition(root, files):
    """Encoder to unit vectors ``[N, D]``: one image at a time through transformers alone."""
    vectors = {}
    for name, path in OFFICIAL.items():
        processor, model = AutoImageProcessor.from_pretrained(root / path), AutoModel.from_pretrained(root / path).eval()
        rows = []
        for file in files:
            pixels = processor(Image.fromarray(upright(file)), return_tensors="pt")["pixel_values"]
            if "clip" in name:
                row = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
            else:
                row = model(pixels).last_hidden_state[0, 0]
            rows.append(row.double().numpy())
        vectors[name] = np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    return vectors


def test_equals_the_definitions_on_images_of_every_size_and_mode(score, mirror, folders):
    result = score("ours", "--batch_size", 6)
    names = [row["name"] for row in result["per_image"]]
    assert len(names) == 14
    sources = by_definition(mirror, [folders / "sources" / name for name in names])
    ours = by_definition(mirror, [folders / "ours" / f"{name}.png" for name in names])
    expected_NE = np.stack([(sources[name] * ours[name]).sum(1) for name in OFFICIAL], 1)
    got_NE = np.array([[row["cosine"][name] for name in OFFICIAL] for row in result["per_image"]])
    assert np.abs(got_NE - expected_NE).max() < 1e-4
    assert np.ptp(expected_NE, axis=0).min() > 0.05  # they differ by far more than that

    for column, name in enumerate(OFFICIAL):
        ends = result["statistics_by_model"][name]
        assert ends["average_similarity"] == pytest.approx(expected_NE[:, column].mean(), abs=1e-4)
        assert ends["min_similarity"] == pytest.approx(expected_NE[:, column].min(), abs=1e-4)
        assert ends["max_similarity"] == pytest.approx(expected_NE[:, column].max(), abs=1e-4)
        assert result["scores"][name]["value"] == ends["average_similarity"]
    scores = result["scores"]
    assert scores["overall"]["value"] == pytest.approx(expected_NE.mean(), abs=1e-4)
    assert scores["held_out"]["value"] == pytest.approx(expected_NE[:, 2:].mean(), abs=1e-4)
    assert [scores["overall"][end] for end in ("value", "low", "high")] == pytest.approx(bootstrap(got_NE.mean(1), 200))

    every_ENN = np.stack([ours[name] @ sources[name].T for name in OFFICIAL])  # reconstruction, source
    partners = []
    for n, row in enumerate(result["per_image"]):
        distance_N = np.abs(every_ENN[:, n] - np.array([[row["floor"][name]] for name in OFFICIAL])).max(0)
        partners.append(int(distance_N.argmin()))
        assert distance_N.min() < 1e-4
    assert sorted(partners) == list(range(14))  # every source once,
    assert all(n != partner for n, partner in enumerate(partners))  # never with its own reconstruction
    floor = scores["floor/overall"]["value"]
    assert scores["calibrated/overall"]["value"] == pytest.approx((scores["overall"]["value"] - floor) / (1 - floor))


def test_what_cannot_be_scored_is_named_and_in_no_mean(score, capsys):
    result = score()
    assert result["left_out"] == {
        "unmatched_sources": ["lost_source.png"],
        "unmatched_reconstructions": ["stray.png"],
        "ambiguous": {},
        "unreadable": {
            "reconstructions/no_image.png": result["left_out"]["unreadable"]["reconstructions/no_image.png"],
            "sources/truncated.png": result["left_out"]["unreadable"]["sources/truncated.png"],
        },
    }
    said = capsys.readouterr().out
    assert all(name in said for name in ("lost_source.png", "stray.png", "no_image.png", "truncated.png"))
    assert "truncated" in result["left_out"]["unreadable"]["sources/truncated.png"]


def test_has_the_official_layout_and_ours(score, tmp_path):
    result = score()
    assert result["model_types"] == list(OFFICIAL)
    for name in OFFICIAL:
        similarities = result["similarities_by_model"][name]
        assert set(similarities) >= {"odd.png", "lost_source.png", "truncated.png"}
        assert similarities["lost_source.png"] is None
        assert similarities["truncated.png"] is None
        known = [value for value in similarities.values() if value is not None]
        ends = result["statistics_by_model"][name]
        assert (ends["total_images"], ends["valid_pairs"]) == (len(similarities), len(known)) == (17, 14)
        assert result["summary"]["average_scores_by_model"][name] == pytest.approx(np.mean(known))
    averages = result["summary"]["average_scores_by_model"].values()
    assert result["summary"]["overall_average"] == pytest.approx(np.mean(list(averages))) == result["scores"]["overall"]["value"]
    assert result["benchmark"] == "unified_bench_1"
    assert result["system"] == "ours"
    assert set(result["backend"]["encoders"]) == set(OFFICIAL)
    assert "| overall |" in (tmp_path / "result.md").read_text()
    with Image.open(tmp_path / "result.png") as sheet:
        assert sheet.width > sheet.height / 2 > 100


def test_identity_is_one_and_calibrates_to_one(score):
    result = score("sources")
    assert all(abs(value - 1) < 1e-6 for row in result["per_image"] for value in row["cosine"].values())
    assert result["scores"]["calibrated/overall"]["value"] == pytest.approx(1, abs=1e-6)
    # Copies of one image are no mismatched pair: grey, lost_source and no_image are.
    assert all(row["floor"] is None or max(row["floor"].values()) < 1 - 1e-5 for row in result["per_image"])


def cosines(result):
    return np.array([[*row["cosine"].values(), *row["floor"].values()] for row in result["per_image"]])


def test_batches_threads_and_cache_change_nothing(score, monkeypatch):
    first = score("ours", "--batch_size", 32)
    for words in (["--batch_size", 1, "--workers", 1], ["--batch_size", 5, "--workers", 3]):
        again = score("ours", *words, "--cache", "false")
        assert np.abs(cosines(again) - cosines(first)).max() < 1e-6

    def forbidden(*args):
        raise AssertionError("embedded again")

    monkeypatch.setattr(Tower, "embed_prepared", forbidden)
    monkeypatch.setattr(Tower, "prepare", forbidden)
    assert (cosines(score("ours")) == cosines(first)).all()
    with pytest.raises(AssertionError, match="embedded again"):
        score("ours", "--cache", "false")


def test_encoders_with_equal_preprocessing_share_the_prepared_image(score, monkeypatch):
    """Of the four official encoders, CLIP and LongCLIP: three preparations of an image, not four."""
    made = []
    of_bytes = Preprocessing.of_bytes
    monkeypatch.setattr(Preprocessing, "of_bytes", lambda rule, image: made.append(image.data_ptr()) or of_bytes(rule, image))
    pairs = score("ours")["per_image"]
    assert len(made) == 3 * (2 * len(pairs) + 2)  # of two more pairs, one image cannot be read


def test_an_interrupted_run_goes_on_where_it_stopped_and_torn_files_are_made_again(score, tmp_path, monkeypatch):
    whole = score("ours", "--cache", "false", output="whole.json")
    embed, done = Tower.embed_prepared, []

    def counting(self, pixels_NCHW):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(len(pixels_NCHW))
        return embed(self, pixels_NCHW)

    monkeypatch.setattr(Tower, "embed_prepared", counting)
    stop = 9  # two groups of all four encoders, and one batch more
    with pytest.raises(SystemExit, match="130"):
        score("ours", "--batch_size", 4)
    assert not (tmp_path / "result.json").exists()
    before, stop = sum(done), None
    done.clear()
    assert (np.abs(cosines(score("ours", "--batch_size", 4)) - cosines(whole)) < 1e-6).all()
    different, readable = 28, 30  # two halves of broken pairs are copies of other files
    assert different * 4 <= before + sum(done) <= readable * 4
    assert before > 30

    files = sorted(file for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert len(files) == different * 4
    files[0].write_bytes(files[0].read_bytes()[:-8])
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes()[:-4] + b"\0\1\2\3")
    done.clear()
    assert (np.abs(cosines(score("ours", "--batch_size", 4)) - cosines(whole)) < 1e-6).all()
    assert 3 <= sum(done) <= 6  # an image may be in the folders twice


def test_two_systems_are_compared_on_the_images_they_share(score, folders):
    theirs = folders / "theirs"
    if not theirs.exists():
        theirs.mkdir()
        for i, name in enumerate(["odd.png", "tall.bmp", "dot.png", "grey.png"]):
            Image.fromarray(shapes(40, 40, 90 + i)).save(theirs / f"recon_{name.split('.')[0]}.png")
    ours, other = score("ours", output="ours.json"), score("theirs", output="theirs.json")
    rows = {row["name"]: row for row in ours["per_image"]}
    gaps = [rows[row["name"]]["overall"] - row["overall"] for row in other["per_image"]]
    expected = bootstrap(np.array(gaps), 300, 1)
    difference = paired_difference(cases_of(ours), other, 300, 1)
    assert difference["overall"]["n"] == 4
    assert [difference["overall"][end] for end in ("value", "low", "high")] == pytest.approx(expected)
    clip = [rows[row["name"]]["cosine"]["clip"] - row["cosine"]["clip"] for row in other["per_image"]]
    assert difference["clip"]["value"] == pytest.approx(np.mean(clip))
    assert paired_difference(cases_of(ours), ours)["overall"] == {"value": 0.0, "n": 14, "low": 0.0, "high": 0.0}

    foreign = json.loads(json.dumps(other))
    foreign["backend"]["encoders"]["clip"]["fingerprint"] = "0"
    with pytest.raises(ValueError, match="different weights or preprocessing of clip"):
        check_comparable(ours, foreign)
    for row in (row for rows in other["cases"].values() for row in rows):
        row["name"] = "0"
    with pytest.raises(ValueError, match="no source image in common"):
        paired_difference(cases_of(ours), other)
    with pytest.raises(ValueError, match="only results"):
        check_comparable(ours, {**other, "benchmark": "geneval"})


def test_the_difference_is_printed_and_stored(score, tmp_path, capsys):
    score("ours", output="ours.json")
    result = score("sources", "--compare", tmp_path / "ours.json", "--system", "copy")
    assert result["comparison"]["other"] == "ours"
    assert result["comparison"]["difference"]["overall"]["value"] > 0.1
    assert "Difference to ours, paired" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sources", "nowhere"], "sources='nowhere' is not a folder"),
        (["--encoders", "nowhere.yaml"], "--encoders: there is no file 'nowhere.yaml'"),
        (["--compare", "nowhere.json"], "no result at 'nowhere.json'"),
        (["--batch_size", "0"], "must be 1 or more"),
        (["--output", "."], "--output '.': allowed"),
        (["--output", "sheet.png"], "allowed: a file that ends in .json"),
        (["--output", "/proc/no/r.json"], "cannot be written (No such file or directory)"),
    ],
)
def test_mistakes_are_one_line(score, words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        score("ours", *words)
    error = capsys.readouterr().err
    assert said in error
    assert error.strip().count("\n") == 0


def test_a_result_of_other_encoders_is_refused_before_anything_is_measured(score, tmp_path, capsys, monkeypatch):
    score()
    other = json.loads((tmp_path / "result.json").read_text())
    other["backend"]["encoders"]["dinov2"]["fingerprint"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(other))
    monkeypatch.setattr("uae.bench.score.command.measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="2"):
        score("ours", "--compare", tmp_path / "other.json")
    assert "different weights or preprocessing of dinov2" in capsys.readouterr().err


def test_folders_without_a_pair_are_refused(score, folders, capsys):
    alone = folders / "alone"
    alone.mkdir(exist_ok=True)
    shutil.copy(folders / "ours" / "stray.png", alone / "other.png")
    with pytest.raises(SystemExit, match="2"):
        score("alone")
    assert "17 sources and 1 reconstructions without a partner" in capsys.readouterr().err


@pytest.mark.parametrize("obstacle", ["a file", "no home", "a full disk"])
def test_a_cache_that_cannot_be_written_costs_time_and_no_score(score, tmp_path, monkeypatch, capsys, obstacle):
    words = ["--encoders", ROOT / "configs/bench/tiny.yaml"]
    expected = score("ours", *words)
    options = {"cache": "new"}
    if obstacle == "a file":
        (tmp_path / "new").write_text("")
    elif obstacle == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)  # of a user whom the machine does not know
        words += ["--cache_folder", default_folder()]
    else:
        monkeypatch.setattr(feature_cache, "write_whole", full)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert score("ours", *words, **options)["scores"] == expected["scores"]
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("warning:")]
    assert len(said) == 1
    assert "--cache_folder" in said[0]
    assert "--cache false" in said[0]
    assert not (tmp_path / "~").exists()


def full(path, content):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_image_is_overwritten_by_the_contact_sheet(folders, tmp_path, capsys):
    shutil.copytree(folders / "ours", tmp_path / "ours")
    before = (tmp_path / "ours/stray.png").read_bytes()
    words = ["--sources", str(folders / "sources"), "--reconstructions", str(tmp_path / "ours"), "--cache", "false"]
    with pytest.raises(SystemExit, match="2"):
        main(["score", *words, "--output", str(tmp_path / "ours/stray.json"), "--encoders", str(ROOT / "configs/bench/tiny.yaml")])
    assert "is one of the images; give a file in another folder" in capsys.readouterr().err
    assert (tmp_path / "ours/stray.png").read_bytes() == before
