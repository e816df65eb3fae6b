"""What all benchmarks with judges share: sending the requests of a plan, and estimating their cost."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from uae.bench.judging.asking import JudgingRun
from uae.bench.judging.cache import AnswerCache
from uae.bench.judging.requests import JudgingPlan, read_plan


def ask(folder: str, max_cost_usd: float, dry_run: bool, cache: str | None, retry_errors: bool) -> dict[str, Any]:
    """Send the requests of a plan that have no answer yet; print, return and write (``status.json``) how many are answered then.

    Args:
        folder: Folder of the plan.
        max_cost_usd: Most that all requests of the plan may cost in USD, earlier runs included.
        dry_run: Only print the number of calls and their cost; this needs no keys and no network.
        cache: File of answers; None is ``answers.jsonl`` in the folder.
        retry_errors: Whether to send a request again that another model answered than the one that was asked.
    """
    plan, answers = read_plan(folder), open_cache(folder, cache)
    asking = JudgingRun(plan, answers, max_cost_usd, retry_errors)
    print(estimate(asking))
    if dry_run:
        return {"status": "dry run", "calls": 0}
    with answers.writing():
        asking.run()
    found = status(plan, answers) | {"calls": asking.attempts.calls}
    Path(folder, "status.json").write_text(json.dumps(found, indent=2) + "\n")
    for failure, times in Counter(asking.attempts.failures).most_common(5):
        print(f"{times} times: {failure}")
    for judge, why in asking.attempts.closed.items():
        print(f"JUDGE LOST: {judge} is out of this run ({why}); without its answers the panel is smaller")
    print(
        f"{found['status']}: {found['answered']} of {found['questions']} requests answered, {found['invalid']} of them "
        f"invalid, {found['errors']} by another model; {asking.attempts.calls} calls now, {found['cost_usd']:.4f} USD in all"
    )
    return found


def open_cache(folder: str, cache: str | None) -> AnswerCache:
    """The answers to a plan: ``answers.jsonl`` in its folder, or another file."""
    return AnswerCache(cache or Path(folder, "answers.jsonl"))


def status(plan: JudgingPlan, cache: AnswerCache) -> dict[str, Any]:
    """How many requests of a plan are answered, and what they cost; equal requests count once."""
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
    """Judge to the ids of the models that answered; an alias may have answered as several."""
    found: dict[str, set[str]] = {name: set() for name in plan.judges}
    for request in plan.requests:
        records = cache.records.get(request.key, ())
        found[request.judge] |= {record["answered"] for record in records if "text" in record and record["answered"]}
    return {name: sorted(answered) for name, answered in found.items()}


def estimate(asking: JudgingRun) -> str:
    """A table of the number of calls and their cost, by judge."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for request in asking.pending():
        row = totals[request.judge]
        for i, more in enumerate((1, asking.usual_usd(request), asking.most_usd(request))):
            row[i] += more
    totals["all"] = [sum(row[i] for row in totals.values()) for i in range(3)]
    lines = [f"{'judge':24s} {'calls':>7s} {'USD about':>10s} {'at most':>10s}"]
    lines += [f"{name:24s} {calls:7.0f} {about:10.2f} {most:10.2f}" for name, (calls, about, most) in totals.items()]
    if totals["all"][1] > asking.max_cost_usd:
        lines.append(f"--max_cost_usd {asking.max_cost_usd:g} is less: the run will stop part-way; run again with more to continue")
    return "\n".join(lines)
