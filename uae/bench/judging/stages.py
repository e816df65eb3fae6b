"""What all benchmarks with judges share: asking a plan's requests, and telling what it would cost."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from uae.bench.judging.asking import JudgingRun
from uae.bench.judging.cache import AnswerCache
from uae.bench.judging.requests import JudgingPlan, read_plan


def ask(folder: str, max_cost_usd: float, dry_run: bool, cache: str | None, retry_errors: bool) -> dict[str, Any]:
    """Ask what a plan's requests lack; returns, prints and writes (``status.json``) how far it came.

    Args:
        folder: Of the plan.
        max_cost_usd: At most this much, earlier runs included.
        dry_run: Only tell how many calls there are and what they cost. Needs no keys and no network.
        cache: File of answers.
        retry_errors: Ask again where another model answered.
    """
    plan, answers = read_plan(folder), open_cache(folder, cache)
    asking = JudgingRun(plan, answers, max_cost_usd, retry_errors)
    print(estimate(asking))
    if dry_run:
        return {"status": "dry run", "calls": 0}
    with answers.writing():
        asking.run()
    found = status(plan, answers) | {"calls": asking.calls}
    Path(folder, "status.json").write_text(json.dumps(found, indent=2) + "\n")
    for failure, times in Counter(asking.failures).most_common(5):
        print(f"{times} times: {failure}")
    for judge, why in asking.closed.items():
        print(f"JUDGE LOST: {judge} is out of this run ({why}); without its answers the panel is smaller")
    print(
        f"{found['status']}: {found['answered']} of {found['questions']} requests answered, {found['invalid']} of them "
        f"invalid, {found['errors']} by another model; {asking.calls} calls now, {found['cost_usd']:.4f} USD in all"
    )
    return found


def open_cache(folder: str, cache: str | None) -> AnswerCache:
    """A plan's answers: ``answers.jsonl`` beside it, or another file."""
    return AnswerCache(cache or Path(folder, "answers.jsonl"))


def status(plan: JudgingPlan, cache: AnswerCache) -> dict[str, Any]:
    """How far a plan's requests are answered; equal requests count once."""
    unique = {request.key: request for request in plan.requests}
    found = [cache.answer(request, plan.prompt) for request in unique.values()]
    answered = sum(answer is not None for answer in found)
    return {
        "status": "complete" if answered == len(unique) else "partial",
        "questions": len(unique),
        "answered": answered,
        "invalid": found.count("invalid"),
        "errors": sum(bool(cache.errors(key)) for key in unique),
        "cost_usd": cache.spent(unique),
        "models": models(plan, cache),
    }


def models(plan: JudgingPlan, cache: AnswerCache) -> dict[str, list[str]]:
    """The models that answered, by judge: of an alias there may be several."""
    found: dict[str, set[str]] = {name: set() for name in plan.judges}
    for request in plan.requests:
        records = cache.records.get(request.key, ())
        found[request.judge] |= {record["answered"] for record in records if "text" in record and record["answered"]}
    return {name: sorted(answered) for name, answered in found.items()}


def estimate(asking: JudgingRun) -> str:
    """A table of calls and cost by judge."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for request in asking.pending():
        row = totals[request.judge]
        for i, more in enumerate((1, asking.usual_usd(request), asking.most_usd(request))):
            row[i] += more
    totals["all"] = [sum(row[i] for row in totals.values()) for i in range(3)]
    lines = [f"{'judge':24s} {'calls':>7s} {'USD about':>10s} {'at most':>10s}"]
    lines += [f"{name:24s} {calls:7.0f} {about:10.2f} {most:10.2f}" for name, (calls, about, most) in totals.items()]
    if totals["all"][1] > asking.max_cost_usd:
        lines.append(f"max_cost_usd={asking.max_cost_usd:g} is less: the run will stop part-way, and go on when run again")
    return "\n".join(lines)
