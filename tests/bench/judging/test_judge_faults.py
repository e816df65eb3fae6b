"""A judge's server that fails in every way, and what is done about it."""

from collections import Counter
from pathlib import Path

import pytest

from tests.bench.judging.fake_judges import ANTHROPIC, FIRST, OPENAI, PAID, once, records, run, serving
from uae.bench.judging import command as judge
from uae.bench.vendors.attempts import STRIKES


@pytest.mark.parametrize("api", ["openai", "anthropic"])
@pytest.mark.parametrize(
    "fault",
    [{"status": status, "headers": {"retry-after-ms": "1"}} for status in (408, 409, 429, 500, 503, 529)] + [{"drop": True}],
    ids=str,
)
def test_what_may_pass_is_tried_again(judging, api, fault):
    with serving(once(fault)) as server:
        folder = judging(server, images=1, apis=(api,), concurrency=1)
        assert run(folder)["status"] == "complete"
        assert len(server.requests) == 3
        assert len(server.paid) == 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_will_not_pass_is_not(judging, status):
    with serving(once({"status": status})) as server:
        folder = judging(server, images=1, concurrency=1)
        assert run(folder)["status"] == "partial"
        assert len(server.requests) == 2
        assert run(folder)["status"] == "complete"  # it was not paid, so it is asked in the next run
        assert len(server.requests) == 3


def test_retry_after_is_honoured(judging):
    with serving(once({"status": 429, "headers": {"retry-after": "0.4"}})) as server:
        run(judging(server, images=1, concurrency=1))
        first, second, _ = server.requests
        assert second["at"] - first["at"] >= 0.4
        assert first["text"] == second["text"]


def test_too_long_a_pause_is_left_to_the_next_run(judging):
    with serving(once({"status": 429, "headers": {"retry-after": "99999"}})) as server:
        folder = judging(server, images=1, concurrency=1)
        assert run(folder)["status"] == "partial"
        assert len(server.requests) == 2


def test_a_timeout_is_tried_again_and_counted_as_if_paid(judging):
    with serving(once({"hang": True})) as server:
        folder = judging(server, images=1, concurrency=1, timeout=2)
        found = run(folder)
        assert (found["status"], len(server.requests)) == ("complete", 3)
        (lost,) = [record for record in records(folder) if "lost" in record]
        assert found["cost_usd"] == pytest.approx(2 * PAID + lost["cost_usd"])


def test_tries_come_to_an_end_and_a_dead_judge_is_left_alone(judging, capsys):
    with serving(lambda request: {"status": 500}) as server:
        folder = judging(server, images=5, concurrency=1, retries=1)
        assert run(folder)["status"] == "partial"
        assert len(server.requests) == 2 * STRIKES
    assert "JUDGE LOST: openai" in capsys.readouterr().out


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_retired_model_or_a_bad_key_ends_its_judge_only(judging, capsys, status):
    def react(request):
        return {"status": status} if request["model"] == ANTHROPIC else FIRST

    with serving(react) as server:
        folder = judging(server, apis=("openai", "anthropic"), concurrency=1)
        found = run(folder)
        assert (found["status"], found["answered"]) == ("partial", 6)
        assert Counter(request["model"] for request in server.requests) == {OPENAI: 6, ANTHROPIC: 1}
        assert "JUDGE LOST: anthropic" in capsys.readouterr().out
        result = judge.score(folder, str(Path(folder, "r.json")))
    assert result["status"] == "partial"
    assert result["scores"]["win_rate"]["n"] == 3
    assert "PANEL INCOMPLETE: no answer by anthropic" in capsys.readouterr().out
    with pytest.raises(ValueError, match="families names mine; allowed: ours, theirs"):
        judge.score(folder, str(Path(folder, "r.json")), families={"mine": "openai"})


@pytest.mark.parametrize(
    "garbage", ["I like both.", {"raw": "<html>gateway</html>"}, {"raw": "{}"}, {"raw": "[]"}, {"raw": '{"choices": []}'}], ids=str
)
@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_garbage_is_asked_for_once_more_and_then_invalid(judging, garbage, api):
    with serving(once(garbage)) as server:
        folder = judging(server, images=1, apis=(api,), concurrency=1)
        found = run(folder)
        assert (found["status"], found["invalid"], len(server.requests)) == ("complete", 0, 3)
    with serving(lambda request: garbage) as server:
        folder = judging(server, images=2, apis=(api,), concurrency=1)
        found = run(folder, cache=str(Path(folder, "others.jsonl")))
        assert (found["status"], found["invalid"], len(server.requests)) == ("complete", 4, 8)
        assert run(folder, cache=str(Path(folder, "others.jsonl")))["calls"] == 0


def test_an_answer_by_another_model_is_no_verdict(judging):
    with serving(once({"model": "cheaper-2024-08-06", "text": FIRST})) as server:
        folder = judging(server, images=2, concurrency=1)
        found = run(folder)
        assert (found["status"], found["answered"], found["errors"]) == ("partial", 3, 1)
        assert found["cost_usd"] == pytest.approx(4 * PAID)
        assert run(folder)["calls"] == 0  # it was paid
        assert run(folder, retry_errors=True)["status"] == "complete"
        assert len(server.requests) == 5
    (error,) = [record["error"] for record in records(folder) if "error" in record]
    assert error == f"asked {OPENAI}, answered cheaper-2024-08-06"


def test_a_judge_that_is_always_another_model_is_left_alone(judging):
    with serving(lambda request: {"model": "cheaper", "text": FIRST}) as server:
        assert run(judging(server, images=9, concurrency=1))["answered"] == 0
        assert len(server.requests) == STRIKES


def test_an_alias_may_answer_with_its_date(judging):
    with serving(lambda request: {"model": "judge-o-2024-08-06", "text": FIRST}) as server:
        assert run(judging(server, model="judge-o", allow_alias=True))["status"] == "complete"
