"""Numbers published in the paper (arXiv 2509.09666, CVPR 2026), measured by its authors; none of them is measured here."""

from __future__ import annotations

import re
from typing import NamedTuple

SOURCE = "arXiv 2509.09666"


class Published(NamedTuple):
    """One model in one of the paper's tables.

    Args:
        model: Name of the model in the paper.
        scores: Regular expression that the name of a score here must match, to the published number in [0, 1].
        uncertain: Regular expressions of the scores whose numbers could not be checked against the paper's text.
    """

    model: str
    scores: dict[str, float]
    uncertain: tuple[str, ...] = ()


_ENCODERS = ("clip", "longclip", "dinov2", "dinov3", "overall")
_GENEVAL = ("counting", "colors", "color_attr", "overall")
_MMT = (".*small.?object.*", ".*person.?re.?id.*", ".*transparent.?object.*", ".*salient.*rgb.?d.*")


def _row(model: str, names: tuple[str, ...], *numbers: float, uncertain: tuple[str, ...] = ()) -> Published:
    return Published(model, {name: number / 100 for name, number in zip(names, numbers, strict=True)}, uncertain)


def _main(*numbers: float) -> list[Published]:
    models = ("UniWorld", "UniWorld + Unified-GRPO", "Janus-Pro", "Janus-Pro + Unified-GRPO")
    return [_row(model, ("overall",), number) for model, number in zip(models, numbers, strict=True)]


TABLES: dict[str, list[Published]] = {
    "unified_bench_1": [
        _row("GPT-4o-Image", _ENCODERS, 90.42, 94.37, 81.74, 77.27, 85.95, uncertain=("overall",)),
        _row("BAGEL", _ENCODERS, 88.97, 93.35, 78.55, 73.05, 83.48),
        _row("Janus-Pro", _ENCODERS, 88.72, 93.45, 78.30, 70.61, 82.77),
        _row("Janus-Pro + Unified-GRPO", ("overall",), 89.1),
        _row("UniWorld-V1", _ENCODERS, 85.49, 91.53, 72.12, 66.83, 78.99),
        _row("UAE", _ENCODERS, 90.50, 94.35, 81.98, 77.54, 86.09, uncertain=_ENCODERS[:4]),
    ],
    "GenEval": [
        _row("Janus-Pro", _GENEVAL, 59, 90, 79, 80),
        _row("OmniGen2", _GENEVAL, 64, 88, 76, 80),
        _row("BAGEL", _GENEVAL, 81, 88, 63, 82),
        _row("UAE", _GENEVAL, 84, 90, 79, 86),
        _row("UniWorld", ("overall",), 84.0),
        _row("UniWorld + Unified-GRPO", ("overall",), 89.0),
        _row("Janus-Pro + Unified-GRPO", ("overall",), 84.3),
    ],
    "GenEval (rewritten)": [_row("BAGEL", _GENEVAL, 84, 95, 77, 88), _row("UAE", _GENEVAL, 82, 95, 84, 89)],
    "geneval_plus": [_row("BAGEL", ("overall",), 37.1), _row("UAE", ("overall",), 47.5, uncertain=("overall",))],
    "DPG-Bench": _main(81.2, 86.4, 84.2, 88.9),
    "MMBench": _main(83.5, 84.8, 79.2, 80.3),
    "MMMU": _main(58.6, 58.2, 41.0, 41.6),
    "MMT-Bench": [
        _row("Qwen2.5-VL-3B", _MMT, 5, 15, 15, 25),
        _row("Qwen2.5-VL-3B + Unified-GRPO", _MMT, 45, 75, 45, 45),
    ],
}
CAVEATS = {
    "unified_bench_1": "the paper's 100 images and its captions are not published; a difference below 1 point is within its noise",
    "GenEval": "the paper used the original detector (mmdet); others, named in brackets, are not proven equal to it; its main "
    "table does not say where prompts were rewritten (89.0 is also UAE's score with rewriting)",
    "DPG-Bench": "the paper used mPLUG-large in the original program, that is mode official",
    "geneval_plus": "the paper's judge was gpt-4.1 of its time",
    "MMBench": "the paper names neither version nor split; harness and prompts move scores by several points",
    "MMMU": "the paper names neither harness nor prompts, which move scores by up to 10 points",
    "MMT-Bench": "about 20 questions per subtask: 5.0 is probably 1 of 20, with a 95 % interval from 1 to 24",
}


def published(benchmark: str) -> tuple[list[Published], str]:
    """The paper's rows for a benchmark, and the reason why they are not directly comparable; no rows for own prompts or questions."""
    base = re.sub(r" \[[^]]*\]$", "", benchmark)  # without the detector, model or harness in brackets
    if base.startswith(("MMBench", "MMMU", "MMT-Bench")):
        base = base.split(" (")[0]
    elif base in ("DPG-Bench official", "DPG-Bench fixed"):
        base = "DPG-Bench"
    return TABLES.get(base, []), CAVEATS.get(base.removesuffix(" (rewritten)"), "")


def number(row: Published, name: str) -> tuple[float, bool] | None:
    """The published number for a score, and whether it is uncertain; None if the paper has no such number."""
    for pattern, value in row.scores.items():
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return value, pattern in row.uncertain
    return None
