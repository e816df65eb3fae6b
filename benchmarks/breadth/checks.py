"""Whether a text-to-image pipeline, loaded as a configuration loads it, draws and trains as it should."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.breadth.checkpoints.catalog import Entry
from uae.models.captioners.loading import Reading
from uae.models.conditioners.states import EmbeddingCondition
from uae.models.finetune import LoRA
from uae.models.flow.policy import Exploration, FlowPolicy
from uae.models.renderers.diffusers import DiffusersRenderer, PipelineCondition
from uae.models.renderers.rendering import Rendering
from uae.systems.any_pipeline import AnyPipeline
from uae.systems.blueprints import pipeline_skeletons
from uae.types import UMM
from uae.weights.placement import Placement

TEXTS = ["a red square", "a tiny blue ring at top left and a white cross on a navy background", "a pink cross"]
SEEDS = [3, 3, 5]
SIDE = 32  # pixels
PIXELS, RATIO = 5e-5, 1e-6  # tolerances in float32: rounding, which four steps under guidance amplify


def measured(folder: Path, captioner: Path, entry: Entry) -> dict[str, Any]:
    """What holds for one pipeline at guidance 1 and 3. Errors that the project raises on purpose are kept as "refused"."""
    import diffusers

    found: dict[str, Any] = {}
    library = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    library.set_progress_bar_config(disable=True)
    for guidance in (1.0, 3.0):
        key = f"guidance {guidance:g}"
        umm = _tried(found, key, lambda guidance=guidance: _built(folder, captioner, guidance, entry))
        if umm is None:
            continue
        drawn = _tried(found, key, lambda guidance=guidance, umm=umm: _drawing(umm, copy.copy(library), entry, guidance))
        if drawn is not None:
            found[key] = drawn
            found[f"policy, {key}"] = _tried(found, f"policy, {key}", lambda umm=umm: _training(umm)) or found[f"policy, {key}"]
    if all("moves" in found.get(key, {}) for key in ("guidance 1", "guidance 3")):
        one, three = (found[key].pop("moves") for key in ("guidance 1", "guidance 3"))
        found["guidance moves pixels by"] = _apart(one, three)
    for key in ("guidance 1", "guidance 3"):
        found.get(key, {}).pop("moves", None)
    found["plan"] = _tried(found, "plan", lambda: _planned(folder, library)) or found["plan"]
    return found


def _tried(found: dict[str, Any], key: str, do: Callable[[], Any]) -> Any:
    """The result, or None with the reason in ``found[key]``: "refused" where the project says so in one line."""
    try:
        return do()
    except Exception as error:
        text = str(error)
        refused = isinstance(error, ValueError | ImportError) and ("change " in text or "set " in text or "pip install" in text)
        found[key] = {"refused" if refused else "crash": f"{type(error).__name__}: {text}".splitlines()[0][:300]}
        return None


def _built(folder: Path, captioner: Path, guidance: float, entry: Entry) -> UMM:
    placement = Placement("float32")
    rendering = Rendering(SIDE, SIDE, steps=entry.steps, guidance=guidance, placement=placement)
    reading = Reading(dtype="float32")
    return AnyPipeline(str(captioner), str(folder), None, entry.tokens, placement, reading, rendering).build()


@torch.no_grad()
def _drawing(umm: UMM, library: Any, entry: Entry, guidance: float) -> dict[str, Any]:
    """Differences of pixels: one row alone, the library's own call, the same again; and what the caption changes."""
    renderer = umm.renderer
    assert isinstance(renderer, DiffusersRenderer)
    condition = umm.conditioner.encode(TEXTS)
    before = torch.get_rng_state()
    images = renderer.render(condition, SEEDS)
    state = torch.equal(before, torch.get_rng_state())
    alone = torch.cat([renderer.render(umm.conditioner.encode([text]), [seed]) for text, seed in zip(TEXTS, SEEDS, strict=True)])
    report = {
        "alone": _apart(images, alone),
        "own call": _apart(images, _own(library, entry, guidance)),
        "again": _apart(images, renderer.render(condition, SEEDS)),
        "caption moves pixels by": _apart(images[0], images[1]),
        "text": not isinstance(condition, EmbeddingCondition),
        "global generator untouched": state,
        "moves": images,
    }
    if isinstance(condition, EmbeddingCondition):
        report["gradient"] = _gradient(renderer, condition)
    return report


@torch.enable_grad()
def _gradient(renderer: DiffusersRenderer, condition: EmbeddingCondition) -> float:
    """The largest derivative of the pixels' mean with respect to the embeddings; nan if one is not finite."""
    embeds = condition.embeds_NLD.clone().requires_grad_(True)
    images = renderer.render(EmbeddingCondition(embeds, condition.mask_NL, condition.pooled_NP), SEEDS, grad=True)
    (gradient,) = torch.autograd.grad(images.mean(), embeds)
    return float(gradient.abs().max())


def _own(pipe: Any, entry: Entry, guidance: float) -> Tensor:
    """The images that the library itself draws, one call per row, as its documentation calls it."""
    entry.prepare(pipe, guidance)
    arguments = {**entry.guidance(guidance), **dict(entry.own), "height": SIDE, "width": SIDE, "num_inference_steps": entry.steps}
    arguments |= {"max_sequence_length": entry.tokens} if entry.tokens else {}
    images = []
    with torch.random.fork_rng(devices=[]):
        for text, seed in zip(TEXTS, SEEDS, strict=True):
            generator = torch.Generator().manual_seed(seed)
            drawn = pipe(prompt=text, generator=generator, output_type="np", return_dict=False, **arguments)[0]
            images.append(torch.tensor(drawn)[..., :3].permute(0, 3, 1, 2))
    return torch.cat(images)


def _training(umm: UMM) -> dict[str, Any]:
    """The policy's ratio at the weights that drew, its pixels without noise, and the layers that an adapter finds."""
    renderer = umm.renderer
    assert isinstance(renderer, DiffusersRenderer)
    condition: PipelineCondition = umm.conditioner.encode(TEXTS)
    plain = renderer.render(condition, SEEDS)
    report: dict[str, Any] = {"ratio": 0.0}
    for window, start in ((3, 0), (2, "random")):
        policy = FlowPolicy(copy.copy(renderer), Exploration(window=window, start=start))
        trajectory = policy.sample(condition, SEEDS)
        with torch.no_grad():
            ratio = (policy.logprobs(trajectory) - trajectory.logp_RS).exp()
        report["ratio"] = max(report["ratio"], float((ratio - 1).abs().max()))
        renderer.pipe.transformer = policy.learner.network.model
    still = FlowPolicy(copy.copy(renderer), Exploration(noise_level=1e-7))
    if getattr(renderer.pipe.scheduler.config, "solver_order", 1) == 1:  # others are Euler's method in a policy only
        report["pixels without noise"] = _apart(plain, still.pixels(still.sample(condition, SEEDS)))
    LoRA(2).attach(still.learner, keep_reference=False)
    still.logprobs(still.sample(condition, SEEDS)).sum().backward()
    weights = {name: weight for name, weight in still.learner.network.named_parameters() if "lora_B" in name}
    grads = [float(weight.grad.abs().max()) for weight in weights.values() if weight.grad is not None]
    report |= {"adapted layers": len(weights), "adapted layers with a gradient": sum(0 < grad < float("inf") for grad in grads)}
    return report


def _planned(folder: Path, pipe: Any) -> dict[str, Any]:
    """Parameters by network, as the memory plan counts them, beside those of the networks that are loaded."""
    planned = {name: _size(part) for name, part in pipeline_skeletons(str(folder)).items()}
    loaded = {name: _size(part) for name, part in pipe.components.items() if name in planned}
    if planned != loaded:
        raise AssertionError(f"planned {planned}, loaded {loaded}")
    return {"networks": sorted(planned)}


def _size(part: Any) -> int:
    return sum(weight.numel() for weight in part.parameters())


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of two pictures; infinite if their sizes differ."""
    return float((one - other).abs().max()) if one.shape == other.shape else float("inf")
