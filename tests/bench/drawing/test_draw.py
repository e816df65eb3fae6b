"""Drawing captions by an image model behind an API: each once, for no more money than allowed, into a folder that is scored."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.bench.drawing.fake_images import (
    CAPTIONS,
    PRICE,
    color,
    colors,
    draws,
    letters,
    picture,
    records,
    refuses,
    serving,
    write_captions,
)
from tests.bench.judging.fake_judges import SECRET
from uae.bench.__main__ import main
from uae.bench.generate import prompt_of

ENCODERS = "layout:\n  class_path: uae.encoders.LayoutEncoder\nheld_out: [layout]\n"
FILES = {"a.jpg": "a.jpg.png", "b.png": "b.png", "sub/c.webp": "sub/c.webp.png"}


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Sources whose captions, as ``bench run`` writes them, are drawn and scored: the options of that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "encoders.yaml").write_text(ENCODERS)
    rows = []
    for name in FILES:
        file = tmp_path / "sources" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), color(name)).save(file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        rows.append({"name": name, "caption": f"caption of {name}", "id": 1, "reconstruction": "x", "source_sha256": digest})
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    return {"sources": str(tmp_path / "sources"), "encoders": str(tmp_path / "encoders.yaml")}


def test_from_captions_to_a_scored_folder_in_one_command(scored, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    words = [f"--{key}={value}" for key, value in scored.items()] + ["--captions", str(tmp_path / "captions.json")]
    words += ["--model", "painter-1", "--size", "1024x1024", "--usd_per_image", "0.04", "--max_cost_usd", "5"]
    words += ["--params.quality", "high", "--params.seed", "3", "--output", str(tmp_path / "out")]
    with serving() as server:
        words += ["--base_url", f"{server.address}/v1", "--key_env", "OPENAI_API_KEY"]
        main(["draw", *words])
        monkeypatch.delenv("OPENAI_API_KEY")
        main(["draw", *words])  # all is there: no call, no key
        assert len(server.requests) == 3
        asked = server.requests[0]
    assert asked["headers"]["authorization"] == f"Bearer {SECRET}"
    model = {"model": "painter-1", "size": "1024x1024", "quality": "high", "seed": 3}
    assert sorted(request["body"]["prompt"] for request in server.requests) == [f"caption of {name}" for name in FILES]
    assert {key: value for key, value in asked["body"].items() if key != "prompt"} == model
    assert colors(tmp_path / "out") == {file: color(f"caption of {name}") for name, file in FILES.items()}
    assert prompt_of(tmp_path / "out" / "b.png") == "caption of b.png"
    rows = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert {row["name"]: row["reconstruction"] for row in rows} == FILES
    result = json.loads((tmp_path / "out.json").read_text())
    assert {each["name"]: each["reconstruction"] for each in result["per_image"]} == FILES
    assert result["system"] == "out"
    out = capsys.readouterr().out
    assert "0 images are there, 0 captions have failed, 3 to draw with painter-1: 0.12 USD at 0.04 USD each" in out
    assert "complete: 3 of 3 images" in out
    assert "3 calls now, 0.1200 USD in all" in out


def test_pictures_come_as_letters_or_behind_addresses_that_get_no_key(drawing, tmp_path):
    def react(request):
        name = f"pictures/{request['text'].replace(' ', '_')}.png"
        kinds = [
            {"b64_json": letters(picture(request["text"], format="JPEG")), "url": None},
            {"b64_json": f"data:image/png;base64,{letters(picture(request['text']))}"},
            {"url": f"{server.address}/{name}", "revised_prompt": f"{SECRET} better"},
            {"url": f"/{name}"},
            {"url": f"data:image/webp;base64,{letters(picture(request['text'], format='WEBP'))}"},
        ]
        return {"data": [kinds[request["number"]]]}

    with serving(react) as server:
        found = drawing(server)
    assert (found["status"], found["drawn"], found["calls"]) == ("complete", 5, 5)
    assert found["cost_usd"] == pytest.approx(5 * PRICE)
    drawn, asked = colors(tmp_path / "out"), [f"caption_{i}" if i in (2, 3) else f"caption {i}" for i in range(5)]
    assert max(abs(a - b) for i in range(5) for a, b in zip(drawn[f"{i}.png"], color(asked[i]), strict=True)) <= 4  # JPEG, WebP
    assert len(server.fetched) == 3  # a picture that is paid is fetched again after an error
    assert SECRET not in str(server.fetched)
    assert records(tmp_path / "out")[2]["revised_prompt"] == "[key] better"


def test_equal_captions_are_paid_once(drawing, tmp_path):
    captions = {f"{i}.png": "the same" for i in range(4)}
    with serving() as server:
        assert drawing(server, {"0.png": "the same"})["calls"] == 1
        found = drawing(server, captions | {"new.png": "new"}, concurrency=4)
        assert (found["status"], found["drawn"], found["calls"]) == ("complete", 5, 1)
    assert colors(tmp_path / "out") == {name: color("the same") for name in captions} | {"new.png": color("new")}


def test_the_cap_holds_and_a_higher_one_goes_on(drawing, scored, tmp_path, capsys):
    options = {"captions": dict.fromkeys(FILES, "") | {name: name for name in FILES}, "concurrency": 4}
    with serving() as server:
        with pytest.raises(ValueError, match="1 images are left to draw, so the folder is not scored: raise --max_cost_usd"):
            drawing(server, max_cost_usd=2 * PRICE, **options, **scored)
        assert "the run will stop part-way" in capsys.readouterr().out
        assert len(server.paid) == len(json.loads((tmp_path / "out" / "captions.json").read_text())) == 2
        assert not (tmp_path / "out.json").exists()
        with pytest.raises(ValueError, match=r"--max_cost_usd 0.1 is too small for one more call, which can cost 0.0400 USD"):
            drawing(server, max_cost_usd=0.1, **options)
        assert drawing(server, max_cost_usd=3 * PRICE, **options, **scored)["status"] == "complete"
        assert len(server.paid) == len(set(server.paid)) == len(server.requests) == 3
    assert json.loads((tmp_path / "out.json").read_text())["scores"]["overall"]["n"] == 3


def test_killed_half_way_it_goes_on_and_pays_nothing_twice(drawing, tmp_path):
    """SIGKILL when the server has the fourth request, which it does not answer."""
    process = None

    def react(request):
        if request["number"] == 3:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return {"drop": True}
        return draws(request)

    with serving(react) as server:
        words = ["--captions", write_captions(tmp_path / "captions.json", CAPTIONS), "--output", str(tmp_path / "out")]
        words += ["--model=painter-1", f"--usd_per_image={PRICE}", "--max_cost_usd=1", f"--base_url={server.address}/v1"]
        words += ["--key_env=FAKE_KEY", "--concurrency=1"]
        code = f"from uae.bench.__main__ import main; main(['draw', *{words!r}])"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process.wait(120)
        assert [record["file"] for record in records(tmp_path / "out")] == ["0.png", "1.png", "2.png"]
        found = drawing(server)
        assert (found["status"], found["drawn"], found["calls"]) == ("complete", 5, 2)
        assert len(server.paid) == len(set(server.paid)) == 5
    assert colors(tmp_path / "out") == {name: color(caption) for name, caption in CAPTIONS.items()}


def test_a_picture_without_its_record_is_not_paid_again_but_counted(drawing, tmp_path):
    """A kill between writing a picture and its record; the last line of the file may be torn."""
    with serving() as server:
        drawing(server)
        file = tmp_path / "out" / "draws.jsonl"
        file.write_bytes(file.read_bytes()[:-30])
        found = drawing(server)
        assert (found["calls"], found["status"]) == (0, "complete")
        assert found["cost_usd"] == pytest.approx(5 * PRICE)
        found = drawing(server, CAPTIONS | {"4.png": "changed"})  # the picture goes, and what it has cost stays
        assert found["cost_usd"] == pytest.approx(6 * PRICE)


def test_every_picture_is_on_the_disk_before_its_record(drawing, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr("uae.bench.vendors.records.os.fsync", lambda file: steps.append(len(list((tmp_path / "out").glob("*.png")))))
    with serving(lambda request: steps.append("asked") or draws(request)) as server:
        drawing(server)
    assert steps == [step for i in range(5) for step in ("asked", i + 1)]


@pytest.mark.parametrize(
    "refusal",
    [
        {},
        {"code": None, "message": "This request violates our content policy."},
        {"code": "content_filter", "status": 422, "message": "no"},
        {"code": None, "status": 403, "message": "The prompt was flagged."},
    ],
    ids=str,
)
def test_a_refused_prompt_is_a_failed_image_and_nothing_else(drawing, tmp_path, capsys, refusal):
    captions = {f"bad{i}.png": f"blood {i}" for i in range(7)} | CAPTIONS | {"none.png": " "}
    with serving(refuses("blood", **refusal)) as server:
        found = drawing(server, captions)
        assert (found["status"], found["drawn"], found["left"], found["calls"]) == ("complete", 5, 0, 12)
        assert sorted(found["failed"]) == sorted([f"bad{i}.png" for i in range(7)] + ["none.png"])
        assert found["cost_usd"] == pytest.approx(5 * PRICE)
        out = capsys.readouterr().out
        assert f"* FAILED: bad0.png (HTTP {refusal.get('status', 400)}: " in out
        assert "* FAILED: none.png (the caption is empty)" in out
        assert "complete: 5 of 13 images" in out
        assert "8 failed, 0 left to draw" in out
        again = drawing(server, captions)
        assert (again["failed"], again["calls"]) == (found["failed"], 0)
        assert json.loads((tmp_path / "out" / "status.json").read_text()) == again
    with serving() as server:  # of another address: another folder
        assert drawing(server, captions, output=str(tmp_path / "other"))["drawn"] == 12


def test_refused_prompts_are_asked_for_again_if_wanted_and_left_out_of_the_score(drawing, scored, tmp_path):
    reactions = [refuses("b.png")]
    captions = {name: f"of {name}" for name in FILES}
    with serving(lambda request: reactions[0](request)) as server:
        drawing(server, captions, **scored)
        result = json.loads((tmp_path / "out.json").read_text())
        assert (result["scores"]["overall"]["n"], result["left_out"]["unmatched_sources"]) == (2, ["b.png"])
        reactions[0] = draws
        assert drawing(server, captions, retry_failed=True, **scored)["calls"] == 1
        assert drawing(server, captions, **scored)["failed"] == {}
    assert json.loads((tmp_path / "out.json").read_text())["scores"]["overall"]["n"] == 3


def test_a_dry_run_says_what_it_would_cost_and_does_nothing(drawing, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FAKE_KEY")
    with serving() as server:
        assert drawing(server, dry_run=True) == {"status": "dry run", "calls": 0}
        assert "5 to draw with painter-1: 0.20 USD" in capsys.readouterr().out
        with pytest.raises(ValueError, match="'painter-1' needs a key: set the environment variable FAKE_KEY"):
            drawing(server)
        assert not server.requests
    assert not list(tmp_path.rglob("*.png"))
    assert not Path(tmp_path, "out", "drawn_by.json").exists()
