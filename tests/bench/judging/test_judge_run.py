"""Asking judges: every answer once, for no more money than allowed, and without a word of the key."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.bench.judging.fake_judges import (
    ANTHROPIC,
    FIRST,
    OPENAI,
    OUTPUT_TOKENS,
    PAID,
    SECRET,
    prefers,
    records,
    run,
    serving,
)
from uae.bench.judging import command as judge
from uae.bench.judging.stages import open_cache
from uae.bench.vendors.budget import Budget


def test_three_stages_with_both_vendors(judging, tmp_path, capsys, monkeypatch):
    with serving(prefers("good")) as server:
        folder = judging(server, apis=("openai", "anthropic"))
        found = run(folder)
        assert (found["status"], found["calls"], len(server.requests)) == ("complete", 12, 12)
        assert found["cost_usd"] == pytest.approx(12 * PAID)
        assert run(folder)["calls"] == 0
        assert len(server.requests) == 12
        asked = {request["model"]: request for request in server.requests}
        assert asked[OPENAI]["path"] == "/v1/chat/completions"
        assert asked[OPENAI]["headers"]["authorization"] == f"Bearer {SECRET}"
        assert asked[ANTHROPIC]["path"] == "/v1/messages"
        assert SECRET in str(asked[ANTHROPIC]["headers"])  # its header depends on the version of the library
        pictures = [part for part in asked[ANTHROPIC]["body"]["messages"][0]["content"] if part["type"] == "image"]
        assert pictures[0]["source"]["media_type"] == "image/png"
    monkeypatch.setattr(socket, "socket", None)  # offline from here
    result = judge.score(folder, str(tmp_path / "one.json"))
    judge.score(folder, str(tmp_path / "two.json"))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert result["benchmark"] == "protocol2-compatible"
    assert result["scores"]["win_rate"] == {"value": 1.0, "n": 3, "low": 1.0, "high": 1.0}
    assert result["backend"]["judges"] == {"openai": [OPENAI], "anthropic": [ANTHROPIC]}
    assert "| ours over theirs | 100.0 |" in capsys.readouterr().out


def test_the_cap_holds_and_a_higher_one_goes_on(judging, capsys):
    with serving(prefers("good")) as server:
        folder = judging(server, images=10, concurrency=4)
        found = run(folder, cap=0.05)
        assert found["status"] == "partial"
        assert 0 < len(server.paid) * PAID <= 0.05
        assert json.loads(Path(folder, "status.json").read_text())["status"] == "partial"
        paid = len(server.paid)
        with pytest.raises(ValueError, match=r"--max_cost_usd 0.05 is too small for one more call"):
            run(folder, cap=0.05)
        assert len(server.requests) == paid
        assert run(folder, cap=1.0)["status"] == "complete"
        assert len(server.paid) == len(set(server.paid)) == 20
    assert "the run will stop part-way" in capsys.readouterr().out


def test_the_cap_holds_for_calls_whose_answers_never_come(judging):
    with serving(lambda request: {"drop": True}) as server:
        folder = judging(server, images=4, concurrency=1, retries=6)
        found = run(folder, cap=0.1)
        most = [record["cost_usd"] for record in records(folder)]
        assert 1 < len(server.requests) == len(most) < 4 * 7
        assert found["cost_usd"] == pytest.approx(sum(most))
        assert sum(most) <= 0.1 < sum(most) + max(most)


def test_nothing_is_asked_without_money(judging):
    with serving(prefers("good")) as server:
        with pytest.raises(ValueError, match="--max_cost_usd 0 is too small"):
            run(judging(server), cap=0.0)
        assert not server.requests
        assert run(judging(server, usd_per_million_input=0, usd_per_million_output=0), cap=0.0)["status"] == "complete"


def test_a_dry_run_says_what_it_would_cost(judging, capsys, monkeypatch):
    monkeypatch.delenv("FAKE_KEY")
    with serving(prefers("good")) as server:
        folder = judging(server, apis=("openai", "anthropic"))
        assert run(folder, dry_run=True) == {"status": "dry run", "calls": 0}
        assert not server.requests
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines[-3:]] == [["openai", "6"], ["anthropic", "6"], ["all", "12"]]
        with pytest.raises(ValueError, match="set the environment variable FAKE_KEY"):
            run(folder)


def test_equal_questions_are_asked_once_even_at_the_same_time(judging):
    names = [f"{i}.png" for i in range(4)]
    same = dict.fromkeys(names, "good")
    systems = {"ours": dict.fromkeys(names, "good good"), "b": same, "c": same}
    with serving(prefers("good")) as server:
        folder = judging(server, systems=systems, concurrency=8)
        assert run(folder)["status"] == "complete"
        assert len(server.requests) == len(set(server.paid)) * len(names) == 8
    result = judge.score(folder, str(Path(folder, "r.json")))
    assert [result["pairs"][f"ours over {b}"]["panel"]["value"] for b in "bc"] == [1.0, 1.0]


def test_a_torn_last_line_costs_its_own_call_only(judging):
    with serving(prefers("good")) as server:
        folder = judging(server, concurrency=1)
        run(folder)
        answers = Path(folder, "answers.jsonl")
        answers.write_bytes(answers.read_bytes()[:-30])
        assert run(folder)["calls"] == 1
        assert run(folder)["calls"] == 0
        assert len(server.requests) == 7


def test_killed_half_way_it_goes_on_and_pays_nothing_twice(judging):
    """SIGKILL when the server has the fifth request, which it does not answer."""
    process = None

    def react(request):
        if request["number"] == 4:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return {"drop": True}
        return prefers("good")(request)

    with serving(react) as server:
        folder = judging(server, images=5, concurrency=1)
        code = f"from uae.bench.judging.stages import ask; ask({folder!r}, 1.0, False, None, False)"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process.wait(120)
        assert len(records(folder)) == 4
        found = run(folder)
        assert (found["status"], found["calls"]) == ("complete", 6)
        assert len(server.paid) == len(server.requests) - 1 == 10
        assert set(Counter(request["number"] for request in server.requests).values()) == {1}


def test_two_runs_at_once_are_refused(judging):
    with serving(prefers("good")) as server:
        folder = judging(server)
        with open_cache(folder, None).writing(), pytest.raises(ValueError, match="another run is writing"):
            run(folder)
        assert not server.requests


def test_an_image_that_changed_since_is_refused(judging, tmp_path):
    with serving(prefers("good")) as server:
        folder = judging(server)
        (tmp_path / "images" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\nother")
        with pytest.raises(ValueError, match=r"000.png' has changed since"):
            run(folder)
        assert not server.requests


def test_the_key_is_nowhere(judging, capfd, caplog):
    """The server repeats it in answers, in names of models and in messages of errors."""
    caplog.set_level("DEBUG")
    said = {"error": {"message": f"bad key {SECRET}"}}
    reactions = [
        {"text": f"{SECRET} {FIRST}"},
        {"status": 400, "body": said},
        {"status": 500, "body": said, "headers": {"retry-after-ms": "1"}},
        {"raw": f"<html>{SECRET}</html>"},
        {"text": FIRST, "model": SECRET},
        {"status": 401, "body": said},
    ]
    with serving(lambda request: reactions[request["number"] % len(reactions)]) as server:
        for api in ("openai", "anthropic"):
            folder = judging(server, images=6, apis=(api,), concurrency=1)
            run(folder)
    written = [path.read_text() for path in Path(folder).parent.rglob("*") if path.is_file() and path.suffix != ".png"]
    out, err = capfd.readouterr()
    assert any("[key]" in text for text in written)
    assert "bad key [key]" in out
    assert not [text for text in (*written, out, err, caplog.text) if SECRET in text]
    assert len(server.requests) >= 10


def test_a_key_that_no_header_can_hold_is_not_repeated(judging, monkeypatch, capsys):
    bad = f"{SECRET}\n\u2603"
    monkeypatch.setenv("FAKE_KEY", bad)
    with serving(prefers("good")) as server:
        run(judging(server, images=1, retries=0))
        assert not server.paid
    assert "5ecret" not in capsys.readouterr().out


def test_output_tokens_count_reasoning_that_is_in_the_total_alone(judging, monkeypatch):
    with serving(prefers("good")) as server:
        shape = server.shape

        def with_reasoning(request, reaction):
            answer = shape(request, reaction)
            answer["usage"]["total_tokens"] += 90
            return answer

        monkeypatch.setattr(server, "shape", with_reasoning)
        folder = judging(server, images=1)
        run(folder)
    assert {record["output_tokens"] for record in records(folder)} == {OUTPUT_TOKENS + 90}


def test_money_is_set_aside_for_calls_under_way():
    async def spend(cost):
        budget = Budget(cap=0.1, spent=0.0)
        assert await budget.promise(0.06)
        second = asyncio.ensure_future(budget.promise(0.06))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not second.done()  # it depends on what the first will have cost
        await budget.pay(0.06, cost)
        return await second

    assert asyncio.run(spend(0.04))
    assert not asyncio.run(spend(0.041))


def test_every_answer_is_on_the_disk_before_the_next_is_asked_for(judging, monkeypatch):
    synced = []
    with serving(lambda request: synced.append(len(records(folder))) or FIRST) as server:
        folder = judging(server, concurrency=1)
        Path(folder, "answers.jsonl").touch()
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: synced.append("fsync") or fsync(file))
        run(folder)
    assert synced == [step for i in range(6) for step in (i, "fsync")]
