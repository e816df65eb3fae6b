"""Changes to the denoising loop of a pipeline for one call. The schedule remains that of the pipeline.

`stepping` and `gradient_through` change the scheduler, so they need the copy from
`uae.models.pipelines.loading.fresh_scheduler`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from uae.models.pipelines.contracts import GUIDERS, denoiser_of
from uae.models.pipelines.quirks import quirks_of

Advance = Callable[[int, float, float, Tensor, Tensor], Tensor]  # step, t, t_next, x, velocity at t -> x at t_next


def check_flow(pipe: Any) -> None:
    """Check that a pipeline draws by flow matching, with one prediction of the denoiser per step.

    Raises:
        ValueError: It does not.
    """
    scheduler = getattr(pipe, "scheduler", None)
    config = getattr(scheduler, "config", {})
    euler = type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    solver = config.get("use_flow_sigmas", False) and config.get("prediction_type") == "flow_prediction"
    if getattr(pipe, "transformer", None) is None or not (euler or solver) or getattr(scheduler, "order", 1) != 1:
        raise ValueError(
            f"{type(pipe).__name__} with {type(scheduler).__name__} does not draw by flow matching, so its steps have no "
            "log-probs here; allowed: FlowMatchEulerDiscreteScheduler, or a solver with use_flow_sigmas; change model.init_args.system"
        )


def check_steps(pipe: Any, guided: bool) -> None:
    """Check that a denoising step depends on latents, caption and time alone, so that a replay of some steps repeats them.

    Raises:
        ValueError: It depends on more.
    """
    name, meanflow = type(pipe).__name__, getattr(getattr(denoiser_of(pipe), "config", None), "use_meanflow", False)
    reason = quirks_of(type(pipe)).no_policy
    if guided and any(getattr(pipe, part, None) is not None for part in GUIDERS):
        reason = "its guider remembers earlier steps; allowed: model.init_args.system.init_args.rendering.guidance=1"
    if meanflow:
        reason = "its network is told where a step ends, and the last step of a part of the schedule ends elsewhere"
    if reason:
        raise ValueError(f"{name} cannot be trained step by step: {reason}; change model.init_args.system, or train captions only")


@contextmanager
def stepping(pipe: Any, advance: Advance, first: int = 0, stop: int | None = None) -> Iterator[None]:
    """Inside, the pipeline computes the steps ``first`` to ``stop - 1`` with the function ``advance``.

    The times come from the pipeline's own scheduler, shifts included. Of a multistep solver (Sana's) only the times are
    used, so the steps without noise are Euler steps.

    Args:
        pipe: Pipeline whose scheduler is a copy.
        advance: Function of the number of the step, t and t_next (1 is noise, 0 is the image), latents and velocity. It
            returns the latents at t_next.
        first: Number of the first step.
        stop: Number after that of the last step; None takes all steps. With ``stop == first`` the pipeline only decodes.
    """
    scheduler, numbers = pipe.scheduler, itertools.count(first)
    plan = scheduler.set_timesteps
    inverted = scheduler.config.get("invert_sigmas", False)  # t = 0 is noise, and the velocity points to the image

    @functools.wraps(plan)  # pipelines look at its signature
    def set_timesteps(*arguments: Any, **named: Any) -> None:
        plan(*arguments, **named)
        scheduler.timesteps = scheduler.timesteps[first:stop]

    def step(model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any) -> Any:
        number = next(numbers)
        t, t_next = scheduler.sigmas[number : number + 2].tolist()
        if inverted:
            t, t_next, model_output = 1 - t, 1 - t_next, -model_output
        latents = advance(number, t, t_next, sample, model_output)
        return SimpleNamespace(prev_sample=latents) if return_dict else (latents,)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    yield


@contextmanager
def gradient_through(pipe: Any, last: int) -> Iterator[None]:
    """Inside, only the velocities of the last steps keep their graph. For calls with gradient.

    Gradients are switched off inside the denoiser alone, so the embeddings that the pipeline prepares from the condition
    and the autoencoder keep their graphs.

    Args:
        pipe: Pipeline whose scheduler is a copy.
        last: Number of denoising steps, counted from the end, that keep their graph.
    """
    scheduler, taken = pipe.scheduler, 0
    step = scheduler.step

    @functools.wraps(step)
    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal taken
        taken += 1
        return step(*arguments, **named)

    def before(*_: Any) -> None:
        torch.set_grad_enabled(taken >= len(scheduler.timesteps) - last)

    def after(*_: Any) -> None:
        torch.set_grad_enabled(True)

    scheduler.step = counted
    network = denoiser_of(pipe)
    hooks = network.register_forward_pre_hook(before), network.register_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
