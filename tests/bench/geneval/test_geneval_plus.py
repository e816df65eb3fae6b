"""GenEval++: what the judge is asked, and what its answers amount to."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.bench.judging.fake_judges import judge_entry, serving, write_judges
from uae.bench.__main__ import main
from uae.bench.geneval import plus as geneval_plus
from uae.bench.geneval.prompts import read_prompts
from uae.bench.result import summarize

PROMPT = str(Path(__file__).parents[3] / "configs/bench/judges/prompts/geneval_plus.yaml")
TAGS = ("counting", "color_attr", "size_spatial_attr")


def rows(number=12):
    """Three tags in turn; the prompt of line n names it."""
    return [
        {
            "tag": TAGS[line % 3],
            "include": [{"class": "cat", "count": 5}, {"class": "dog", "count": 1, "color": "red", "region": "left"}],
            "exclude": [{"class": "cat", "count": 6}],
            "prompt": f"line {line}",
        }
        for line in range(1, number + 1)
    ]


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Twelve prompts with images but for lines 4 and 5."""
    monkeypatch.setenv("FAKE_KEY", "x")
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows())))
    (tmp_path / "images").mkdir()
    for line in set(range(1, 13)) - {4, 5}:
        suffix = "jpg" if line % 2 else "png"
        Image.new("RGB", (8, 8), (line, 0, 0)).save(tmp_path / "images" / f"{line}.{suffix}")

    def run(server, **more):
        judges = write_judges(tmp_path / "judge.yaml", one=judge_entry("openai", server.address, concurrency=2))
        words = [tmp_path / "prompts.jsonl", tmp_path / "images", tmp_path / "work"]
        geneval_plus.run(*map(str, words), **{"max_cost_usd": 9.0, "judge": judges, "prompt": PROMPT, **more})
        return str(tmp_path / "work")

    return run


def line_of(request):
    return int(re.search(r"<prompt>\nline (\d+)\n</prompt>", request["text"])[1])


def test_missing_and_failed_are_wrong_and_tags_weigh_equally(case, tmp_path, capsys):
    """Lines 1, 2, 3, 6, 9 are right; 4 and 5 have no image; 7 gets no readable answer, 8 none at all; others are wrong."""

    def react(request):
        line = line_of(request)
        if line == 7:
            return "It depends."
        return {"status": 400} if line == 8 else json.dumps({"correct": int(line in (1, 2, 3, 6, 9))})

    with serving(react) as server:
        folder = case(server)
        assert len(server.requests) == 11  # ten images, one asked about twice
        case(server)
        assert len(server.requests) == 12  # what failed unpaid is asked again
    result = geneval_plus.score(folder, str(tmp_path / "r.json"))
    assert result["verdicts"] == [1, 1, 1, 0, 0, 1, -1, -1, 1, 0, 0, 0]
    assert (result["missing"], result["failed"], result["status"]) == ([4, 5], [7, 8], "partial")
    expected = {"counting": 3 / 4, "color_attr": 1 / 4, "size_spatial_attr": 1 / 4}
    assert {tag: result["scores"][tag]["value"] for tag in TAGS} == expected
    assert result["scores"]["overall"]["value"] == pytest.approx(sum(expected.values()) / 3)
    assert (result["system"], result["benchmark"]) == ("images", "geneval_plus")
    said = capsys.readouterr().out
    assert "MISSING, counted as wrong: 2 of 12 images, e.g. 4, 5" in said
    assert "2 failed, counted as wrong: 7; 8" in said
    assert "partial: 9 of 10 answers" in said


def test_tags_weigh_equally_whatever_their_size():
    found = summarize(geneval_plus.scored_cases(["a"] * 8 + ["b"] * 2, [1] * 8 + [-1, 0]))
    assert found["overall"]["value"] == 0.5
    assert found["correct images"]["value"] == 0.8
    assert found["a"] == pytest.approx({"value": 1.0, "n": 8, "low": 0.6756, "high": 1.0}, abs=1e-4)


def test_the_judge_is_told_everything_and_sees_the_file_itself(case, tmp_path):
    with serving(lambda request: '{"correct": 1}') as server:
        case(server)
        by_line = {line_of(request): request["body"]["messages"] for request in server.requests}
        system, user = by_line[3]
        text = user["content"][1]["text"]
        assert "1. exactly 5 of: cat\n2. exactly 1 of: dog; it is red; it is in the left half of the image\n" in text
        assert "3. fewer than 6 of: cat" in text
        assert user["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
        assert "photograph" in system["content"]


def test_every_word_of_the_metadata_reaches_the_checklist():
    include = [
        {"class": "cup", "count": 2, "color": "green", "region": "above", "size": "larger"},
        {"class": "fork", "count": 1, "region": "below", "size": "smaller"},
        {"class": "bowl", "count": 1, "region": "right"},
    ]
    assert geneval_plus.checklist({"include": include}).splitlines() == [
        "1. exactly 2 of: cup; each of them is green; each of them is in the upper half of the image; "
        "each of them is clearly larger than the other objects",
        "2. exactly 1 of: fork; it is in the lower half of the image; it is clearly smaller than the other objects",
        "3. exactly 1 of: bowl; it is in the right half of the image",
    ]


def test_drawings_are_named_after_lines(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows(3))))
    job = geneval_plus.generate(str(tmp_path / "p.jsonl"), str(tmp_path / "i"), seed=1)
    drawn = [(drawing.path.name, drawing.prompt, len(drawing.seeds)) for drawing in job.drawings]
    assert drawn == [("1.png", "line 1", 1), ("2.png", "line 2", 1), ("3.png", "line 3", 1)]
    assert len({drawing.seeds for drawing in job.drawings}) == 3


def test_mistakes_are_one_line(case, tmp_path, capsys):
    def fails(*words):
        with pytest.raises(SystemExit, match="2"):
            main(["geneval_plus", *words])
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    folders = ["--images", str(tmp_path / "images"), "--folder", str(tmp_path / "work")]
    panel = str(Path(PROMPT).parents[1] / "local.yaml")
    words = ["--judge", panel, "--prompt", PROMPT]
    assert "get Geneval++.jsonl of" in fails("run", "--prompts", str(tmp_path / "none"), *folders, *words)
    (tmp_path / "bad.jsonl").write_text('{"tag": "a", "prompt": "b", "include": []}')
    assert "line 1 of" in fails("run", "--prompts", str(tmp_path / "bad.jsonl"), *folders, *words)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "1.png")
    assert "line 1 has several images" in fails("run", "--prompts", str(tmp_path / "prompts.jsonl"), *folders, *words)
    assert "give --config FILE" in fails("generate", "--prompts", str(tmp_path / "prompts.jsonl"), "--images", "x")
    folders[1] = str(tmp_path)
    assert "no image of 12 prompts" in fails("run", "--prompts", str(tmp_path / "prompts.jsonl"), *folders, *words)


def test_suffixes_in_other_cases_and_marks_at_the_start_of_a_file_are_read(tmp_path):
    lines = [json.dumps({**row, "prompt": "before\u2028after"}, ensure_ascii=False) for row in rows(2)]
    (tmp_path / "p.jsonl").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    assert [row["prompt"] for row in geneval_plus.read_lines(tmp_path / "p.jsonl")] == ["before\u2028after"] * 2
    for name in ("1.PNG", "2.Jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert geneval_plus.image_files(tmp_path, 2) == {1: tmp_path / "1.PNG", 2: tmp_path / "2.Jpg"}


@pytest.mark.parametrize("read", [geneval_plus.read_lines, read_prompts])
def test_an_empty_prompt_is_named_and_not_drawn(tmp_path, read):
    prompts = [{"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": text} for text in ("two cows", " ")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    with pytest.raises(ValueError, match=r"line 2 of .*; correct --prompts"):
        read(tmp_path / "p.jsonl")
