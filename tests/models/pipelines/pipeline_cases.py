"""Tiny pipelines of every contract, written once per session and loaded as checkpoints are."""

import functools
import itertools
import tempfile
from pathlib import Path

import torch

from uae.models.conditioners.states import EmbeddingCondition
from uae.models.pipelines.contracts import denoiser_of
from uae.models.pipelines.loading import load_pipeline
from uae.rehearsal.pipelines import PIPELINES
from uae.weights.placement import Placement

WITH_EMBEDDINGS = ["sd3", "flux", "sana", "qwen_image", "sdxl"]
SIDE = 32  # pixels
WIDTHS = {"sd3": (32, 32), "flux": (32, 16), "sana": (32, None), "qwen_image": (32, None), "sdxl": (32, 16)}
REAL_GUIDANCE = {"flux": "true_cfg_scale", "qwen_image": "true_cfg_scale"}  # the others call it guidance_scale
LENGTHS = [5, 2, 9, 5]
SEEDS = [3, 3, 5, 2**62 + 1]
TEXTS = ["a red square", "a tiny blue ring at top left", "pink", "two crosses"]
CLOSE = {"atol": 1e-5, "rtol": 0}
FLOAT32 = Placement("float32")
ROOM = tempfile.TemporaryDirectory(prefix="pipelines_")  # is removed when the tests end


@functools.cache
def folder(name):
    path = Path(ROOM.name, name)
    PIPELINES[name](path)
    return path


def load(name, placement=FLOAT32):
    """A pipeline of its own, which a test may change."""
    return load_pipeline(str(folder(name)), placement)


def ragged(name, lengths=LENGTHS, seed=0):
    """Embeddings of some lengths; what is in the padding is large and must not matter."""
    width, pooled = WIDTHS[name]
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(len(lengths), max(lengths), width, generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    embeds[mask == 0] = 30.0
    vector = torch.randn(len(lengths), pooled, generator=generator) if pooled else None
    return EmbeddingCondition(embeds, mask, vector)


def plainly(name, pipe, seed, steps=2, guidance=None, **arguments):
    """One image by the pipeline itself, as its documentation calls it."""
    if guidance is not None:
        arguments[REAL_GUIDANCE.get(name, "guidance_scale")] = guidance
    if name in ("sana", "pixart"):
        arguments["use_resolution_binning"] = False
        if "negative_prompt_embeds" in arguments:
            arguments["negative_prompt"] = None
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    size = {"height": SIDE, "width": SIDE}
    return pipe(num_inference_steps=steps, generator=generator, output_type="pt", **size, **arguments).images[0]


def one_row(condition, row, sign=""):
    """A row without its padding, as keyword arguments."""
    length = int(condition.mask_NL[row].sum())
    arguments = {f"{sign}prompt_embeds": condition.embeds_NLD[row : row + 1, :length]}
    if condition.pooled_NP is not None:
        arguments[f"{sign}pooled_prompt_embeds"] = condition.pooled_NP[row : row + 1]
    return arguments


def masks_of_ones(name, arguments):
    """The mask that a pipeline asks for beside embeddings, for rows without padding."""
    suffix = {"sana": "prompt_attention_mask", "pixart": "prompt_attention_mask", "qwen_image": "prompt_embeds_mask"}.get(name)
    if suffix is None:
        return arguments
    signs = [key.removesuffix("prompt_embeds") for key in arguments if key.endswith("prompt_embeds")]
    ones = {f"{sign}{suffix}": torch.ones(1, arguments[f"{sign}prompt_embeds"].shape[1]).long() for sign in signs}
    return arguments | ones


def mixing(name, pipe, negative, scales):
    """Let a pipeline without guidance draw with it: two calls of its denoiser, without padding, mixed at one scale per step."""
    network, steps = denoiser_of(pipe), itertools.cycle(scales)
    forward = network.forward

    def mixed(*arguments, **named):
        other = {**named, "encoder_hidden_states": negative.embeds_NLD}
        if name in ("sana", "pixart"):
            other["encoder_attention_mask"] = negative.mask_NL
        elif name == "sdxl":
            other["added_cond_kwargs"] = {**named["added_cond_kwargs"], "text_embeds": negative.pooled_NP}
        else:
            other["pooled_projections"] = negative.pooled_NP
        if name == "flux":
            other["txt_ids"] = torch.zeros(7, 3)
        to, away = forward(*arguments, **named)[0], forward(*arguments, **other)[0]
        return (away + next(steps) * (to - away),)

    network.forward = mixed


def computed_rows(pipe):
    """A list that grows by the number of rows that the denoiser computes in every call."""
    rows, forward = [], denoiser_of(pipe).forward

    def counted(*arguments, **named):
        rows.append(len(arguments[0] if arguments else named["hidden_states"]))
        return forward(*arguments, **named)

    denoiser_of(pipe).forward = counted
    return rows


def count_rows(pipe):
    """A list that grows by the number of rows that the pipeline asks for in every call of the denoiser."""
    rows = []

    def note(_, arguments, named):
        rows.append(len(arguments[0] if arguments else named["hidden_states"]))

    denoiser_of(pipe).register_forward_pre_hook(note, with_kwargs=True)
    return rows
