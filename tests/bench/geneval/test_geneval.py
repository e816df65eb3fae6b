import json
import os
import random
from pathlib import Path

import pytest
from PIL import Image

from tests.bench.geneval.test_detection import picture
from tests.bench.understanding import seeing
from uae.bench.fingerprints import git_blob
from uae.bench.geneval import command as geneval
from uae.bench.geneval import detection
from uae.bench.geneval import detector as geneval_detector
from uae.bench.geneval.command import SampleImage, scored_cases
from uae.bench.geneval.prompts import CLASSES, PUBLISHED, read_prompts, variant
from uae.bench.geneval.rules import TAGS, Verdict
from uae.bench.result import Case, mean_score, read_result, summarize

PROMPTS = [  # written for this test
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "one cow"},
    {"tag": "two_object", "include": [{"class": "cow", "count": 1}, {"class": "cup", "count": 1}], "prompt": "cow and cup"},
    {"tag": "colors", "include": [{"class": "tv", "count": 1, "color": "red"}], "prompt": "a red tv"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}], "prompt": "two cows"},
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


# ------------------------------------------------------------------------------------------------------- prompts


def test_published_prompts_are_known_by_their_content(prompts, monkeypatch):
    assert variant(prompts) == "GenEval (own prompts)"
    monkeypatch.setitem(PUBLISHED, git_blob(prompts), "GenEval")
    assert variant(prompts) == "GenEval"
    prompts.write_text(prompts.read_text().rstrip())  # copies differ in how the file ends
    assert variant(prompts) == "GenEval"
    prompts.write_text(prompts.read_text().replace("a red tv", "a red TV"))
    assert variant(prompts) == "GenEval (own prompts)"
    assert sorted(PUBLISHED.values())[:2] == ["GenEval", "GenEval"]
    (prompts.parent / "empty").write_text("")
    assert git_blob(prompts.parent / "empty") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git hash-object /dev/null


def test_classes_are_cocos():
    assert len(set(CLASSES)) == 80
    assert [CLASSES.index(name) for name in ("person", "computer mouse", "tv remote", "computer keyboard")] == [0, 64, 65, 66]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tag": "color"}, "tag 'color'; known: single_object"),
        ({"include": [{"class": "mouse", "count": 1}]}, "class 'mouse'"),
        ({"include": [{"class": "cow", "count": 0}]}, "count 0"),
        ({"include": [{"class": "cow", "count": 1, "color": "gray"}]}, "color 'gray'"),
        ({"include": [{"class": "cow", "count": 1, "position": ["left of", 0]}]}, "an earlier object's number"),
        ({"prompt": 3}, "prompt is no text"),
        ({"include": 3}, "TypeError"),
    ],
)
def test_what_is_no_prompt_is_said_with_its_line(tmp_path, change, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(prompt) for prompt in (PROMPTS[0], {**PROMPTS[0], **change})))
    with pytest.raises(ValueError, match="line 2 of") as error:
        read_prompts(path)
    assert said in str(error.value)


def test_missing_prompts_say_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="raw.githubusercontent.com/djghosh13/geneval"):
        read_prompts(tmp_path / "none.jsonl")


# -------------------------------------------------------------------------------------------------------- scores


def images_of(answers):
    """Tag to lists of verdicts per prompt."""
    images, verdicts = [], []
    for tag, rows in answers.items():
        for row in rows:
            number = images[-1].number + 1 if images else 0
            for sample, correct in enumerate(row):
                images.append(SampleImage(number, sample, {"tag": tag}, f"{number}/{sample}"))
                verdicts.append(Verdict(correct))
    return images, verdicts


def test_the_score_is_the_mean_of_the_tasks_means():
    answers = {"counting": [[True, False]] * 2, "colors": [[False, False]] * 10, "position": [[True, True], [False, True]]}
    scores = summarize(scored_cases(*images_of(answers)))
    assert [scores[tag]["value"] for tag in ("counting", "colors", "position")] == [0.5, 0, 0.75]
    assert next(iter(scores)) == "overall"
    assert scores["overall"]["value"] == pytest.approx((0.5 + 0 + 0.75) / 3)
    assert scores["correct images"]["value"] == pytest.approx(5 / 28)
    assert scores["prompts with a correct image"]["value"] == pytest.approx(4 / 14)
    assert scores["overall"]["low"] < scores["overall"]["value"] < scores["overall"]["high"]


def test_many_fabricated_verdicts_against_plain_sums():
    rng = random.Random(0)
    sizes = zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True)
    answers = {tag: [[rng.random() < 0.6 for _ in range(4)] for _ in range(n)] for tag, n in sizes}
    scores = summarize(scored_cases(*images_of(answers)))
    means = [sum(map(sum, rows)) / (4 * len(rows)) for rows in answers.values()]
    assert scores["overall"]["value"] == pytest.approx(sum(means) / 6, abs=1e-12)
    assert (scores["overall"]["n"], scores["counting"]["n"]) == (2212, 320)
    half = (scores["overall"]["high"] - scores["overall"]["low"]) / 2
    assert 0.016 < half < 0.026  # independent images: 1.96 * sqrt(.24 / 2212)


def test_images_of_a_prompt_are_one_case():
    wide = mean_score([Case(str(i), float(i // 4 % 2), cluster=str(i // 4)) for i in range(400)])
    narrow = mean_score([Case(str(i), float(i // 4 % 2)) for i in range(400)])
    assert wide["high"] - wide["low"] > 1.8 * (narrow["high"] - narrow["low"])
    solved = mean_score([Case(str(i), 1.0, cluster=str(i // 4)) for i in range(40)])
    assert solved["low"] == pytest.approx(0.722, abs=1e-3)  # Wilson, of 10 prompts


# ---------------------------------------------------------------------------------------------------- end to end


@pytest.fixture
def models(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("mirror")
    seeing.mask2former(folder / seeing.MASK2FORMER)
    seeing.color_clip(folder / "clip")
    monkeypatch.setenv("UAE_CHECKPOINTS", str(folder))
    monkeypatch.setattr(detection, "SHORT", 64)
    monkeypatch.setattr(detection, "LONG", 96)
    return ["--color_model", seeing.COLOR_MODEL, "--color_weights", "clip/weights.pt", "--device", "cpu"]


def drawn(folder):
    """Two images per prompt, of odd sizes and modes; one is missing, one is truncated, one is too many."""
    for number, prompt in enumerate(PROMPTS):
        place = folder / f"{number:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps(prompt))
        for sample in range(2):
            image = picture(40 + 13 * number, 50 + sample, seed=10 * number + sample)
            image = image.convert(("RGB", "P", "L", "RGBA")[number])
            image.save(place / "samples" / f"{sample:04d}.png")
    (folder / "00000/samples/0001.png").unlink()
    torn = folder / "00001/samples/0000.png"
    torn.write_bytes(torn.read_bytes()[:700])
    picture(30, 30).save(folder / "00003/samples/0002.png")
    return folder


def test_a_folder_is_scored_and_what_cannot_be_seen_is_wrong(prompts, models, tmp_path, capsys, monkeypatch):
    folder, output = drawn(tmp_path / "images"), tmp_path / "result.json"
    words = ["score", "--prompts", str(prompts), "--output", str(output), "--samples", "2"]
    geneval.main([*words, "--images", str(folder), *models])
    result = read_result(output)
    assert result["benchmark"] == "GenEval (own prompts) [hf]"
    assert result["backend"]["detector"] == seeing.MASK2FORMER
    assert result["backend"]["color_model"] == seeing.COLOR_MODEL
    assert set(result["not_seen"]) == {"00000/samples/0001.png", "00001/samples/0000.png"}
    assert result["not_scored"] == ["00003/samples/0002.png"]
    said = capsys.readouterr().out
    assert "2 not seen, so wrong: 00000/samples/0001.png" in said
    rows = [json.loads(line) for line in (tmp_path / "result.images.jsonl").read_text().splitlines()]
    assert len(rows) == result["scores"]["overall"]["n"] == 8
    assert next(row["reason"] for row in rows if row["filename"] in result["not_seen"]) == "not seen: missing"
    assert not any(row["correct"] for row in rows if row["filename"] in result["not_seen"])

    def never(*_):
        raise AssertionError("detected twice")

    before = output.read_text()
    monkeypatch.setattr(detection.Mask2Former, "__call__", never)
    geneval.main([*words, "--images", str(folder), *models])
    assert output.read_text() == before
    monkeypatch.setattr(geneval_detector, "Mask2Former", never)  # detections alone, without a model or an image
    geneval.main([*words, "--detections", str(tmp_path / "result.detections.jsonl"), "--system", "images"])
    assert read_result(output)["scores"] == result["scores"]
    assert read_result(output)["benchmark"] == result["benchmark"]


def test_detections_of_another_detector_are_scored_under_its_name(prompts, tmp_path):
    lines = [{"made_by": {"name": "mmdet", "detector": "mask2former_swin-s"}}]
    good = {
        0: {"cow": [[0, 0, 9, 9, 0.5]]},
        1: {"cow": [[0, 0, 9, 9, 0.5]], "cup": [[0, 0, 9, 9, 0.31]]},
        2: {"tv": [[0, 0, 9, 9, 0.5, "red"]]},
        3: {"cow": [[0, 0, 9, 9, 0.95], [5, 0, 9, 9, 0.91], [5, 5, 9, 9, 0.89]]},
    }
    lines += [{"key": f"{number:05d}/samples/0000.png", "objects": objects} for number, objects in good.items()]
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["score", "--prompts", str(prompts), "--output", str(tmp_path / "r.json"), "--detections", str(file)]
    geneval.main([*words, "--samples", "1"])
    result = read_result(tmp_path / "r.json")
    assert result["benchmark"] == "GenEval (own prompts) [mmdet]"
    assert result["scores"]["overall"]["value"] == 1.0
    geneval.main([*words, "--samples", "2"])
    assert read_result(tmp_path / "r.json")["scores"]["overall"]["value"] == 0.5  # second images count, and are not there
    assert len(read_result(tmp_path / "r.json")["not_seen"]) == 4


def test_images_of_other_prompts_are_refused_before_anything_is_loaded(prompts, tmp_path):
    folder = drawn(tmp_path / "images")
    (folder / "00002/metadata.jsonl").write_text(json.dumps(PROMPTS[0]))
    with pytest.raises(ValueError, match="is of another prompt than --prompts has there"):
        geneval.main(["score", "--prompts", str(prompts), "--images", str(folder), "--output", str(tmp_path / "r.json")])
    with pytest.raises(FileNotFoundError, match="is no folder; draw one by geneval generate"):
        geneval.main(["score", "--prompts", str(prompts), "--images", str(tmp_path / "x"), "--output", str(tmp_path / "r.json")])


def test_a_changed_image_is_seen_again_and_a_changed_detector_is_refused(prompts, models, tmp_path):
    folder, file = drawn(tmp_path / "images"), tmp_path / "r.detections.jsonl"
    words = ["score", "--prompts", str(prompts), "--images", str(folder), "--output", str(tmp_path / "r.json"), "--samples", "1"]
    geneval.main([*words, *models])
    lines = len(file.read_text().splitlines())
    file.write_bytes(file.read_bytes()[:-30])  # killed while it wrote the last row
    picture(40, 40, seed=99).save(folder / "00000/samples/0000.png")
    geneval.main([*words, *models])
    assert len(file.read_text().splitlines()) == lines + 1  # the torn row once more, and the changed image's
    mirror = Path(os.environ["UAE_CHECKPOINTS"])
    (mirror / "clip/other.pt").write_bytes((mirror / "clip/weights.pt").read_bytes())
    models[3] = "clip/other.pt"
    with pytest.raises(ValueError, match="color_weights=clip/weights.pt, now it is color_weights=clip/other.pt"):
        geneval.main([*words, *models])


def test_pictures_are_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(40, 20).save(tmp_path / "a.jpg", exif=exif)
    assert geneval_detector.read_upright(tmp_path / "a.jpg").size == (20, 40)
