"""Which vision-language families of transformers caption, and train, as their own forward passes say.

    python -m benchmarks.breadth.captioners [FAMILY ...]

Of every family a tiny checkpoint with random weights is written in the layout of the released ones, and loaded as a configuration
loads it. Two images of different sizes get questions of different lengths, and three captions each. Compared are: the log-probs of
the sampler with those of the update (ratio); both with the library's own processor, chat template and forward pass on one image
alone; the gradients of an adapter on the default layers with those of that forward pass; and a part of the batch with the whole.

Writes ``benchmarks/results/breadth_captioners.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.breadth.plain import plain_logprobs
from benchmarks.breadth.tiny.catalog import FAMILIES, write
from benchmarks.results import write as write_report
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.loading import Reading, load_captioner
from uae.models.finetune import LoRA
from uae.types import Rollout, Sampling

BEFORE = json.loads((Path(__file__).parent / "before.json").read_text())  # verdicts of the revision before this benchmark
QUESTIONS = ["Describe the image.", "What is in the picture? Say it in one long sentence."]
LOGP, GRADIENT = 1e-5, 1e-3  # largest difference in nats; of a gradient, as a share of its largest number
LINEAR = 1e-4  # where linear attention is computed in chunks or token by token, which rounds in float32
SIZES = [(36, 36), (30, 96)]


@dataclass
class Verdict:
    """What was measured of a family.

    Args:
        family: Its name.
        ratio: Largest difference of log-probs of sampler and update, in nats.
        logp: Largest difference of the update's log-probs to those of the library's own forward pass.
        part: The same for the second image's captions as a batch of their own.
        future: Largest change of a log-prob when only a later token changes.
        gradient: Largest difference of an adapter's gradients, as a share of the largest number of each.
        layers: Share of the linear layers of the text decoder, routers aside, that the default adapter reaches.
        checkpointing: "same" if gradients with checkpointing are the same, else what is said.
        bfloat16: Mean difference of log-probs of sampler and update in bfloat16.
        said: Why it was refused, or how it crashed.
    """

    family: str
    ratio: float | None = None
    logp: float | None = None
    part: float | None = None
    future: float | None = None
    gradient: float | None = None
    layers: float | None = None
    checkpointing: str = ""
    bfloat16: float | None = None
    said: str = ""

    @property
    def word(self) -> str:
        """The verdict in a word."""
        if self.said:
            return "refused" if "model.init_args" in self.said else "crash"
        logp = LINEAR if "linear attention" in self.checkpointing else LOGP
        limits = {"ratio": logp, "logp": logp, "part": logp, "future": logp, "gradient": GRADIENT, "bfloat16": 0.1}
        wrong = [name for name, limit in limits.items() if not (getattr(self, name) or 0) <= limit]
        return f"wrong ({', '.join(wrong)})" if wrong else "works"


def pictures() -> list[Tensor]:
    """Two images of different sizes, in eighths of a bit's steps, so that nobody rounds them."""
    noise = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=noise) / 255 for size in SIZES]


def difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; infinite if a number is none."""
    return float(torch.nan_to_num((one - other).abs(), nan=torch.inf).max())


def gradients(network: nn.Module, logp: Tensor) -> dict[str, Tensor]:
    """Gradients of an adapter, of a sum of log-probs with weights."""
    adapter = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((logp * weights).sum(), [*adapter.values()], allow_unused=True)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(adapter.items(), found, strict=True)}


def apart(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """Largest difference of gradients, as a share of the largest number of all."""
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    return max(difference(ours[name], plain[name]) for name in plain) / largest


def reached(captioner: HFCaptioner) -> float:
    """Share of the linear layers of the text decoder, routers aside, that have an adapter."""
    from peft.tuners.lora import LoraLayer

    network = captioner.learner.network.base
    decoder, head = network.get_decoder(), network.get_output_embeddings()
    linear = [
        module for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear | LoraLayer) and module is not head and not name.endswith(("gate", "router", "base_layer"))
        and ".lora_" not in name
    ]  # fmt: skip
    return sum(isinstance(module, LoraLayer) for module in linear) / len(linear)


def load(folder: Path, **reading: Any) -> HFCaptioner:
    """The captioner of a folder, as a configuration loads it."""
    return load_captioner(str(folder), Reading(**reading), QUESTIONS[0])


def drawn(captioner: HFCaptioner) -> Rollout[Any]:
    """Three captions of both images."""
    return captioner.sample(captioner.prepare(pictures(), QUESTIONS), 3, Sampling(0.9, 8), range(6))


def judge(verdict: Verdict, folder: Path) -> None:
    """Measure a family; what it raises is caught by the caller."""
    captioner = load(folder, dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LoRA(rank=2).attach(captioner.learner, keep_reference=False)
    network = captioner.learner.network
    for name, weight in network.named_parameters():
        if "lora_B" in name:  # 0 at the start, which would hide the gradient of A
            nn.init.normal_(weight, 0, 0.05, generator=torch.Generator().manual_seed(2))
    verdict.layers = reached(captioner)
    rollout = drawn(captioner)
    logp, plain = captioner.logprobs(rollout), plain_logprobs(captioner, pictures(), QUESTIONS, rollout)
    verdict.ratio, verdict.logp = difference(logp, rollout.logp_RS), difference(logp, plain)
    expected = gradients(network, plain)
    verdict.gradient = apart(gradients(network, logp), expected)
    with torch.no_grad():
        second = rollout.of([1], rollout.group)
        looking = replace(second, context=replace(second.context, features=None))  # its pixels are read, not what the tower saw
        wanted = plain[3:, : second.tokens_NT.shape[1]]
        verdict.part = max(difference(captioner.logprobs(part), wanted) for part in (second, looking))
        changed = rollout.tokens_NT.clone()
        changed[:, -1] = rollout.tokens_NT[:, 0]
        again = captioner.logprobs(replace(rollout, tokens_NT=changed))
        verdict.future = difference(again[:, :-1], logp[:, :-1])
    verdict.checkpointing = checkpointed(folder, captioner, rollout, expected)
    half = load(folder)
    rollout = drawn(half)
    with torch.no_grad():
        verdict.bfloat16 = float((half.logprobs(rollout) - rollout.logp_RS).abs().mean())


def checkpointed(folder: Path, captioner: HFCaptioner, rollout: Rollout[Any], expected: dict[str, Tensor]) -> str:
    """Whether gradients stay the same with gradient checkpointing."""
    try:
        load(folder, dtype="float32", gradient_checkpointing=True)
    except ValueError as error:
        return line(error)
    captioner.learner.network.gradient_checkpointing = True
    off = apart(gradients(captioner.learner.network, captioner.logprobs(rollout)), expected)
    return "same" if off <= GRADIENT else f"off by {off:.1e}"


def line(error: BaseException) -> str:
    """An error in one line, with its place if it is none of ours."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    if "model.init_args" in said:
        return said
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {said} ({Path(last.filename).name}:{last.lineno})"


def measure(family: str, debug: Callable[[], None] = lambda: None) -> Verdict:
    """The verdict on a family."""
    verdict = Verdict(family)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            write(family, Path(folder))
            judge(verdict, Path(folder))
        except Exception as error:  # whatever a family raises is its verdict
            verdict.said = line(error)
            debug()
    return verdict


def number(value: float | None) -> str:
    """A number of the table."""
    return "" if value is None else f"{value:.0e}"


def markdown(verdicts: list[Verdict]) -> str:
    """The table."""
    works = sum(verdict.word == "works" for verdict in verdicts)
    lines = [
        "# Vision-language families as captioners",
        "",
        f"`python -m benchmarks.breadth.captioners`: {works} of {len(verdicts)} families work. Tiny checkpoints of random weights, "
        "loaded as a configuration loads them; two images of different sizes, questions of different lengths, three captions each. "
        "Works: log-probs of sampler and update equal (ratio), equal to the library's own forward pass on one image alone (log-prob), "
        f"for a part of the batch, too ({LOGP:.0e} nats, {LINEAR:.0e} with linear attention); gradients of the default adapter equal "
        f"to its own ({GRADIENT:.0e} of the largest number); no log-prob depends on a later token; bfloat16 loads and draws. "
        "Layers: share of the linear layers of the text decoder, routers aside, that the default adapter reaches. Before: the verdict "
        "of the first measurement.",
        "",
        "| family | before | now | ratio | log-prob | part | gradient | layers | checkpointing | bfloat16 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in verdicts:
        numbers = [number(one.ratio), number(one.logp), number(one.part), number(one.gradient)]
        share = "" if one.layers is None else f"{100 * one.layers:.0f} %"
        recompute = one.checkpointing if len(one.checkpointing) < 30 else "refused"
        cells = [one.family, BEFORE.get(one.family, ""), one.word, *numbers, share, recompute, number(one.bfloat16)]
        lines.append(f"| {' | '.join(cells)} |")
    said = [f"* {one.family}: {one.said}" for one in verdicts if one.said]
    return "\n".join([*lines, "", *said])


def main() -> None:
    """Measure families and write the table, or print it if only some were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="some of them; the table is then printed only")
    parser.add_argument("--debug", action="store_true", help="print where errors come from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    verdicts = []
    for family in options.families or FAMILIES:
        verdicts.append(measure(family, traceback.print_exc if options.debug else lambda: None))
        known = {name: value for name, value in asdict(verdicts[-1]).items() if value not in (None, "")}
        print(known, verdicts[-1].word, flush=True)
    if not options.families:
        write_report("breadth_captioners", {"families": [{**asdict(one), "word": one.word} for one in verdicts]}, markdown(verdicts))


if __name__ == "__main__":
    main()
