"""How a step grows with its sizes: CPU seconds of ours and of plain rows, with the floor of the arithmetic.

    python benchmarks/speed/curves.py

The first four panels are the step of contestants.py. Its floor is two operations for every weight and token that the step
cannot do without: the prompt of an image once and its captions once in each of sampling, reference, update, and its backward
pass; the image tower once. The last two are a renderer, Stable Diffusion 3 at toy size, and the pipeline of diffusers called by
itself; the floor is the arithmetic that torch counts in its networks. All floors are divided by the rate that a product of large
matrices reached in the same run. The picture goes to benchmarks/results/speed_curves.svg.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from contestants import WORDS, Case, model, ours, plain
from diffusers import SD3Transformer2DModel
from racing import in_turns, median, report, table
from results import RESULTS
from torch.utils.flop_counter import FlopCounterMode

from uae.miniature.tiny import assemble_renderer, create_decoder

BASE = Case(vision=256, tokens=32, group=8)
SIZES = {
    "group": ("captions of an image", [2, 8, 16]),
    "tokens": ("tokens of a caption", [16, 32, 128]),
    "vision": ("tokens of an image", [64, 256, 576]),
    "images": ("images", [1, 2, 3]),
}
DRAWN = {"side": ("pixels of a side", [64, 128, 256]), "steps": ("denoising steps", [2, 4, 8])}
QUESTION = 12  # tokens of the prompt that are not the image's


def rate() -> float:
    """Floating-point operations per CPU second of a product of large matrices."""
    left, right = torch.rand(1024, 1024), torch.rand(1024, 1024)
    seconds = in_turns({"product": lambda: left @ right}, 5)["product"]
    return 2 * 1024**3 / min(seconds)


def step_flop(case: Case) -> float:
    """The floor of a step of contestants.py, in floating-point operations."""
    network = model().model
    text, tower = (sum(p.numel() for p in part.parameters()) for part in (network.language_model.layers, network.visual))
    written = case.group * case.tokens
    head = len(WORDS) * network.config.text_config.hidden_size
    return 2.0 * case.images * (4 * case.vision * tower + 4 * (case.vision + QUESTION + written) * text + 4 * written * head)


def steps(case: Case, count: int) -> dict[str, float]:
    """Medians of ours and of plain rows."""
    return {name: median(way(case, count)["cpu"]) for name, way in (("ours", ours), ("plain rows", plain))}


def drawing(side: int, count: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """Ours and the pipeline of diffusers on eight captions, and the floor."""
    conditioner, small = create_decoder(128, 4)
    config = dict(small.pipe.transformer.config) | {"sample_size": side // 8, "pos_embed_max_size": side // 8}
    renderer = assemble_renderer(conditioner, SD3Transformer2DModel.from_config(config), small.pipe.vae, count, 1.0)
    renderer.rendering = replace(renderer.rendering, height=side, width=side)
    condition = conditioner.encode(["a red circle above a blue square"] * 8)
    arguments = {"prompt_embeds": condition.embeds_NLD, "pooled_prompt_embeds": condition.pooled_NP, "output_type": "pt"}
    renderer.pipe.set_progress_bar_config(disable=True)
    ways = {
        "ours": lambda: renderer.render(condition, range(8)),
        "diffusers": lambda: renderer.pipe(
            **arguments, height=side, width=side, num_inference_steps=count, guidance_scale=1.0
        ),  # fmt: skip
    }
    with FlopCounterMode(display=False) as counter:
        ways["ours"]()
    return ways, float(counter.get_total_flops())


def measure(count: int) -> dict[str, dict[str, Any]]:
    """Seconds of every point of every curve."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # every point builds a trainer, which introduces itself
    found: dict[str, dict[str, Any]] = {}
    once: dict[Case, dict[str, float]] = {}  # all curves of a step meet in one case
    for size, (_, values) in SIZES.items():
        found[size] = {}
        for value in values:
            case = replace(BASE, **{size: value})
            if case not in once:
                once[case] = {**steps(case, count), "floor": step_flop(case) / rate()}
            found[size][str(value)] = once[case]
        print(size, found[size], flush=True)
    for size, (_, values) in DRAWN.items():
        found[size] = {}
        for value in values:
            ways, flop = drawing(*((value, 4) if size == "side" else (128, value)))
            seconds = {name: median(own) for name, own in in_turns(ways, count).items()}
            found[size][str(value)] = {**seconds, "floor": flop / rate()}
        print(size, found[size], flush=True)
    return found


def picture(found: dict[str, dict[str, Any]]) -> None:
    """All panels as one SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "uae"  # so that the file changes only with its numbers
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    styles = {"ours": "C0-o", "plain rows": "C1-s", "diffusers": "C1-s", "floor": "k:"}
    for axis, (size, points) in zip(axes.flat, found.items(), strict=True):
        values = [int(value) for value in points]
        for name in next(iter(points.values())):
            axis.plot(values, [point[name] for point in points.values()], styles[name], label=name)
        axis.set_xlabel({**SIZES, **DRAWN}[size][0])
        axis.set_ylabel("CPU seconds")
        axis.set_xticks(values)
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.savefig(RESULTS / "speed_curves.svg", metadata={"Date": None})


def text(found: dict[str, dict[str, Any]]) -> list[str]:
    """The curves as tables, and the slope over the group."""
    lines = ["![curves](speed_curves.svg)", ""]
    for size, points in found.items():
        names = list(next(iter(points.values())))
        rows = [[value, *(point[name] for name in names)] for value, point in points.items()]
        lines += [*table([{**SIZES, **DRAWN}[size][0], *(f"{name}, s" for name in names)], rows), ""]
    first, last = (found["group"][str(SIZES["group"][1][place])] for place in (0, -1))
    more = SIZES["group"][1][-1] - SIZES["group"][1][0]
    slopes = ", ".join(f"{1000 * (last[name] - first[name]) / more:.0f} ms ({name})" for name in first)
    return [*lines, f"One more caption of an image costs {slopes}."]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a point; the first is not counted")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    found = measure(arguments.steps)
    picture(found)
    report("curves", "python benchmarks/speed/curves.py", text(found), found)
    print(f"{time.monotonic() - start:.0f} s")
