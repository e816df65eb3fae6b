"""``python -m uae.bench judge build|run|score``: which captions do language models prefer (protocol2-compatible).

In the paper's second protocol, judges compare captions in pairs; its prompt, tie rule and order of captions are unpublished. The
protocol here is documented: both orders of the captions, published prompts, dated models, and every answer is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from uae.bench.arguments import run as run_command
from uae.bench.fingerprints import sha256
from uae.bench.judging.cache import AnswerCache
from uae.bench.judging.captions import caption_requests, check_sources, compared, find_images, plain, read_captions
from uae.bench.judging.judges import read_judges
from uae.bench.judging.prompt import read_prompt
from uae.bench.judging.requests import JudgingPlan, read_plan, write_plan
from uae.bench.judging.stages import ask, open_cache, status
from uae.bench.judging.statistics.comparisons import Comparison
from uae.bench.judging.statistics.resampling import resample_weights
from uae.bench.judging.statistics.win_rates import WinRates, elo, judges_of_other_families, mean_rate, pair_summary
from uae.bench.result import Score, check_output, write_result
from uae.files.packaged import configuration

BENCHMARK = "protocol2-compatible"
ANSWERS = {"first", "second", "tie"}
JUDGES = "configs/bench/judges/paper_panel.yaml"
PROMPT = "configs/bench/judges/prompts/caption_pair.yaml"


def build(
    captions: dict[str, str],
    images: str,
    folder: str,
    system: str | None = None,
    all_pairs: bool = False,
    judges: str = JUDGES,
    prompt: str = PROMPT,
) -> JudgingPlan:
    """Write the requests of a comparison: each pair of captions, in both orders, for each judge. Sends nothing.

    Args:
        captions: System to file: repeat --captions NAME=FILE, or give a mapping in the configuration. A file is JSON or JSON Lines
            with a name and a caption per image, as ``predict`` writes.
        images: Folder of the images; names of images are paths below it.
        folder: Folder for all files of this comparison.
        system: System that is compared with each other system; the default is the first.
        all_pairs: Whether to compare each system with every other.
        judges: Judge file.
        prompt: Prompt file.
    """
    if len(captions) < 2:
        raise ValueError(f"a comparison needs two systems, given: {', '.join(captions) or 'none'}; add --captions NAME=FILE")
    ours = system or next(iter(captions))
    if ours not in captions:
        raise ValueError(f"--system {ours!r} has no captions; allowed: {', '.join(captions)}")
    judges, prompt = configuration(judges, "--judges"), configuration(prompt, "--prompt")
    panel, asked = read_judges(judges), read_prompt(prompt, ANSWERS)
    raw = {name: read_captions(path) for name, path in captions.items()}
    texts = {name: {image: plain(caption) for image, caption in rows.items()} for name, rows in raw.items()}
    found = find_images(images, sorted({name for rows in texts.values() for name in rows}))
    for file in captions.values():
        check_sources(file, found)
    pairs = compared(list(captions), ours, all_pairs)
    requests = tuple(caption_requests(panel, asked, texts, found, pairs))
    if not found:
        raise ValueError(f"--images {images!r} holds none of the images that the captions name; correct --images")
    about = _about(texts, found, pairs) | {"benchmark": BENCHMARK, "system": ours, "systems": list(captions)}
    about["normalized"] = {name: sum(texts[name][i] != text for i, text in raw[name].items()) for name in raw}
    inputs = {f"captions/{name}": sha256(path) for name, path in captions.items()}
    inputs |= {"judges": sha256(judges), "prompt": sha256(prompt)}
    plan = JudgingPlan(panel, asked, requests, inputs, about)
    write_plan(folder, plan)
    print(_built(plan))
    return plan


def _about(texts: Mapping[str, Mapping[str, str]], images: Mapping[str, Path], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """The cases (image, a, b, words of a, words of b, whether the captions are equal), and what cannot be compared."""
    listed = {name for rows in texts.values() for name in rows}
    cases = []
    for name in sorted(images):
        for a, b in pairs:
            if name in texts[a] and name in texts[b]:
                words = [len(texts[system][name].split()) for system in (a, b)]
                cases.append([name, a, b, *words, texts[a][name] == texts[b][name]])
    lacking = {system: sorted(listed - rows.keys()) for system, rows in texts.items()}
    return {"cases": cases, "without_image": sorted(listed - images.keys()), "without_caption": lacking}


def _built(plan: JudgingPlan) -> str:
    about = plan.about
    lines = [f"{len(about['cases'])} pairs of captions, {len(plan.requests)} requests to {len(plan.judges)} judges"]
    if same := sum(case[-1] for case in about["cases"]):
        lines.append(f"{same} pairs are equal, letter by letter: ties that nobody is asked about")
    for what, names in {"image": about["without_image"], **about["without_caption"]}.items():
        if names:
            lines.append(f"NOT COMPARED, no {'caption of ' * (what != 'image')}{what}: {len(names)}, e.g. {', '.join(names[:3])}")
    return "\n".join(lines)


def run(folder: str, max_cost_usd: float = 0.0, dry_run: bool = False, cache: str | None = None, retry_errors: bool = False) -> None:
    """Send the requests that have no answer yet. Keys are read from the environment. May be stopped and started at any time.

    Args:
        folder: Folder that ``build`` wrote.
        max_cost_usd: Most that these requests may cost in USD, earlier runs included.
        dry_run: Only print the number of calls and their cost.
        cache: File of answers; the default is answers.jsonl in the folder. One file may serve several folders.
        retry_errors: Send a request again that another model answered than the one that was asked.
    """
    ask(folder, max_cost_usd, dry_run, cache, retry_errors)


def score(
    folder: str,
    output: str,
    cache: str | None = None,
    families: dict[str, str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute win rates from the answers so far. Needs no network.

    Args:
        folder: Folder that ``build`` wrote.
        output: Result file, ending in .json.
        cache: File of answers; the default is answers.jsonl in the folder.
        families: System to the family of its model, as --families NAME=FAMILY: judges of that family are left out of
            ``without_own_family``.
        resamples: Number of bootstrap resamples of images, for intervals.
        seed: Seed of the bootstrap.
    """
    check_output(output)
    plan = read_plan(folder)
    answers = open_cache(folder, cache)
    _known(families or {}, plan.about["systems"])
    found, images = comparisons(plan, answers), sorted({case[0] for case in plan.about["cases"]})
    if not any(c.score is not None for c in found):
        raise ValueError(f"no pair of {folder!r} has answers in both orders; run first")
    rates = WinRates(found, images, resample_weights(len(images), resamples, seed))
    pairs = list(dict.fromkeys((case[1], case[2]) for case in plan.about["cases"]))
    judges = {name: judge.family for name, judge in plan.judges.items()}
    summary = {pair: pair_summary(rates.of(*pair), judges_of_other_families(judges, families or {}, pair)) for pair in pairs}
    ours = plan.about["system"]
    own = [rates.of(*pair) for pair in pairs if pair[0] == ours]
    scores = {"win_rate": mean_rate([rate for rate in own if rate.comparisons])} | _scores(summary)
    done = status(plan, answers)
    result = write_result(
        output,
        BENCHMARK,
        ours,
        scores,
        {"judges": done["models"], "prompt": [plan.prompt.name, plan.prompt.version, plan.prompt.digest]},
        plan.inputs,
        **done,
        pairs={f"{a} over {b}": about for (a, b), about in summary.items()},
        elo=_elo(rates, plan.about["systems"]),
        not_compared={key: plan.about[key] for key in ("without_image", "without_caption")},
        normalized=plan.about["normalized"],
    )
    print(win_rate_table(result))
    return result


def _known(families: Mapping[str, str], systems: Sequence[str]) -> None:
    if unknown := sorted(families.keys() - set(systems)):
        raise ValueError(f"--families names {', '.join(unknown)}; allowed: {', '.join(systems)}")


def comparisons(plan: JudgingPlan, cache: AnswerCache) -> list[Comparison]:
    """Both answers of each judge about each pair of captions; equal captions are ties without a request."""
    answers = {}
    for request in plan.requests:
        about = request.about
        answers[about["image"], about["a"], about["b"], request.judge, about["order"]] = cache.answer(request, plan.prompt)
    found = []
    for image, a, b, words_a, words_b, same in plan.about["cases"]:
        for judge in plan.judges:
            said = ["tie" if same else answers.get((image, a, b, judge, order)) for order in ("ab", "ba")]
            found.append(Comparison(image, a, b, judge, words_a, words_b, *said))
    return found


def _scores(summary: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Score]:
    kinds = {"panel": "", "equal_length": " at equal length", "without_own_family": " without own family"}
    scores: dict[str, Score] = {}
    for (a, b), about in summary.items():
        for kind, words in kinds.items():
            if about.get(kind) is not None:
                scores[f"{a} over {b}{words}"] = _only_score(about[kind])
        for judge, numbers in about["judges"].items():
            if "value" in numbers:
                scores[f"{a} over {b} by {judge}"] = _only_score(numbers)
    return scores


def _only_score(numbers: Mapping[str, Any]) -> Score:
    return {"value": numbers["value"], "n": numbers["n"], "low": numbers["low"], "high": numbers["high"]}


def _elo(rates: WinRates, systems: Sequence[str]) -> dict[str, Any]:
    try:
        return dict(elo(rates, systems))
    except ValueError as error:
        return {"undefined": str(error)}


def win_rate_table(result: Mapping[str, Any]) -> str:
    """A result of ``judge score`` as a Markdown table."""
    lines = [f"**{result['benchmark']}**, {result['status']}: {result['answered']} of {result['questions']} answers", ""]
    lines += ["| | win rate | 95 % | images | order changed it | invalid |", "|---|---|---|---|---|---|"]
    for pair, about in result["pairs"].items():
        rows = {pair: about.get("panel") or {}, **{f"... by {judge}": own for judge, own in about["judges"].items()}}
        for name, row in rows.items():
            shown = [f"{100 * row[key]:.1f}" if row.get(key) is not None else "-" for key in ("value", "low", "high")]
            trust = [f"{100 * row[key]:.0f} %" if row.get(key) is not None else "" for key in ("inconsistency", "invalid")]
            flag = " FLAGGED" if row.get("flagged") else ""
            lines.append(f"| {name} | {shown[0]} | {shown[1]} to {shown[2]} | {row.get('n', 0)} | {trust[0]} | {trust[1]}{flag} |")
    if silent := [name for name, models in result["backend"]["judges"].items() if not models]:
        lines += ["", f"PANEL INCOMPLETE: no answer by {', '.join(silent)}"]
    return "\n".join(lines)


def main(args: Sequence[str]) -> None:
    """Run the command with the words behind its name."""
    run_command("judge", {"build": build, "run": run, "score": score}, gathered(args, ("--captions", "--families")))


def gathered(args: Sequence[str], options: Sequence[str]) -> list[str]:
    """Join each repeated option ``--captions NAME=FILE`` into one mapping, which is how the parser reads mappings."""
    found: dict[str, dict[str, str]] = {option: {} for option in options}
    rest, words = list[str](), iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in found:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        name, equals, file = value.partition("=")
        if value.startswith("{") or not equals:
            rest += [option, value]
        else:
            if name in found[option]:
                raise ValueError(f"{option} {name}=... is given twice ({found[option][name]} and {file}); give every system one name")
            found[option][name] = file
    for option, mapping in found.items():
        rest += [option, yaml.safe_dump(mapping, default_flow_style=True, width=10**6, sort_keys=False).strip()] if mapping else []
    return rest
