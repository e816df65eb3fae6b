"""What happens between the steps of a pipeline's loop, changed for one call: its schedule stays its own.

Both work on the copy of the scheduler that `uae.models.pipelines.loading.fresh_scheduler` lends the pipeline.
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

from uae.models.pipelines.contracts import denoiser_of

Advance = Callable[[int, float, float, Tensor, Tensor], Tensor]  # step, t, t_next, x, velocity at t -> x at t_next


def check_flow(pipe: Any) -> None:
    """Raise unless the pipeline's scheduler has the times of a flow, in one prediction per step."""
    scheduler = getattr(pipe, "scheduler", None)
    config = getattr(scheduler, "config", {})
    euler = type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    solver = config.get("use_flow_sigmas", False) and config.get("prediction_type") == "flow_prediction"
    if getattr(pipe, "transformer", None) is None or not (euler or solver) or getattr(scheduler, "order", 1) != 1:
        raise ValueError(
            f"{type(pipe).__name__} with {type(scheduler).__name__} does not draw by flow matching, so its steps have no "
            "log-probs here; allowed: FlowMatchEulerDiscreteScheduler, or a solver with use_flow_sigmas; change the renderer"
        )


@contextmanager
def stepping(pipe: Any, advance: Advance, first: int = 0, stop: int | None = None) -> Iterator[None]:
    """Inside, the pipeline takes some of its steps, each by ``advance``.

    The times are those that its own scheduler makes of whatever the pipeline asks for, shifts included. A scheduler of
    higher order (Sana's) is reduced to its times, so without noise the steps are Euler's.

    Args:
        pipe: Its scheduler must be a copy.
        advance: Called with the number of the step, t and t_next (1 is noise, 0 the image), latents and velocity.
        first: Number of the first step.
        stop: One behind the last step; None takes all. With ``stop == first`` the pipeline only decodes.
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
    """Inside, velocities have a graph in the last so many steps only; for calls with gradient.

    It is the network that is switched, not the loop: what the pipeline prepares from the condition keeps its graph, and
    so does the autoencoder.
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
