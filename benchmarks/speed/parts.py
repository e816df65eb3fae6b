"""CPU seconds of the parts of a step beside what transformers and torch offer for them: captions, the update, the output layer.

    python benchmarks/speed/parts.py

Captions against ``generate``, both with one row for every caption and with ``num_return_sequences``, which encodes the image
once. The update (forward and backward) against rows that hold image, prompt and caption each. The log-probs of 2048 tokens from
hidden states of width 256 and a vocabulary of 151,936, with the gradient of the states, against ``log_softmax``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from contestants import TARGETS, Case, System, generate, logprobs, rows_of
from racing import alone, forget_peak, in_turns, median, peak, report, table
from torch import Tensor

from uae.grpo import selected_logprobs
from uae.models.finetune import LoRA
from uae.types import Sampling

CASES = ("64/32/8", "256/32/8", "256/128/8")
VOCABULARY, WIDTH, TOKENS = 151_936, 256, 2048  # 16 captions of 128 tokens


def contestants(case: Case) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Those that draw captions, and those that learn from them."""
    captioner = System(case.side).build().captioner
    LoRA(rank=16, target_modules=TARGETS).attach(captioner.learner, keep_reference=False)
    (images,) = case.pictures(1)
    context, seeds = captioner.prepare(images), range(case.group)
    rollout = captioner.sample(context, case.group, Sampling(max_tokens=case.tokens), seeds)
    network = captioner.learner.network.model
    one, rows = (rows_of(captioner.processor, images, copies) for copies in (1, case.group))
    ids = torch.cat([rows["input_ids"], rollout.tokens_NT], 1)

    def learn(logp: Callable[[], Tensor]) -> None:
        network.zero_grad()
        logp().mean().backward()

    drawing = {
        "ours": lambda: captioner.sample(context, case.group, Sampling(max_tokens=case.tokens), seeds),
        "generate": torch.no_grad()(lambda: generate(network, one, case.tokens, case.group)),
        "generate, one row each": torch.no_grad()(lambda: generate(network, rows, case.tokens)),
    }
    learning = {
        "ours": lambda: learn(lambda: captioner.logprobs(rollout)),
        "whole rows": lambda: learn(lambda: logprobs(network, rows, ids, case.tokens)),
    }
    return drawing, learning


def head(name: str) -> dict[str, float]:
    """CPU seconds and peak memory of the output layer, in MiB above what its inputs take."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight, ids = torch.randn(VOCABULARY, WIDTH), torch.randint(VOCABULARY, (TOKENS,))
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: selected_logprobs(hidden, weight, ids),
        "log_softmax": lambda: (hidden @ weight.T).log_softmax(-1).gather(1, ids[:, None]),
    }
    before = forget_peak()
    seconds = in_turns({name: lambda: ways[name]().mean().backward()}, 1)[name]
    return {"seconds": median(seconds), "peak_mib": peak() - before}


def measure(rounds: int) -> dict[str, Any]:
    """All races."""
    found: dict[str, Any] = {"draw": {}, "learn": {}, "head": {}}
    for case in CASES:
        drawing, learning = contestants(Case(*map(int, case.split("/"))))
        found["draw"][case] = in_turns(drawing, rounds)
        found["learn"][case] = in_turns(learning, rounds)
        print(case, "done", flush=True)
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "log_softmax": []}
    for _ in range(rounds):
        for name, own in runs.items():
            own.append(alone(__file__, "--head", name))
    found["head"] = runs
    return found


def text(found: dict[str, Any]) -> list[str]:
    """The three tables."""
    lines = ["Cases are vision tokens / caption tokens / group.", ""]
    for part, title in (("draw", "Captions"), ("learn", "Update")):
        peers = [name for name in next(iter(found[part].values())) if name != "ours"]
        rows = []
        for case, seconds in found[part].items():
            ours = median(seconds["ours"])
            rows.append([case, ours, *(x for peer in peers for x in (median(seconds[peer]), median(seconds[peer]) / ours))])
        lines += [*table([title, "ours, s", *(head for peer in peers for head in (f"{peer}, s", "ratio"))], rows), ""]
    seconds, memory = (
        {name: median([run[key] for run in runs]) for name, runs in found["head"].items()} for key in ("seconds", "peak_mib")
    )
    rows = [[name, seconds[name], seconds[name] / seconds["log_softmax"], memory[name]] for name in seconds]
    return [*lines, *table(["Output layer", "s", "of log_softmax", "peak, MiB"], rows)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--head", choices=["ours", "log_softmax"], help="only this way of the output layer, once, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.head:
        print(json.dumps(head(arguments.head)))
        sys.exit()
    found = measure(arguments.rounds)
    report("parts", "python benchmarks/speed/parts.py", text(found), found)
