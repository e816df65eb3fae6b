"""Captions to pictures with BAGEL: denoising steps of the network that also captions, and FLUX's autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uae.learner import Learner
from uae.models.bagel.captioner import BagelPolicy
from uae.models.bagel.guidance import Guidance, Renorm
from uae.models.bagel.pixels import unpatched
from uae.models.bagel.prompts import PromptCondition
from uae.models.lengths import alike
from uae.models.merged import merged
from uae.models.pipelines.calls import Call, generators_of
from uae.weights.placement import Placement, at_work, settle, working_device

KEY = "model.init_args.system.init_args.rendering"


@dataclass(frozen=True)
class BagelRendering:
    """How BAGEL draws. The defaults are those of the official GenEval script at 512 pixels instead of 1024.

    Args:
        height: Height of the images in pixels, a multiple of 16, at most 1024.
        width: Width of the images in pixels, a multiple of 16, at most 1024.
        steps: Number of denoising steps. The official ``num_timesteps`` counts points of time, one more than steps.
        guidance: Scale of text guidance, 1 or more. 1 is none, and saves the pass without text.
        image_guidance: Scale of image guidance, 1 or more. As no image is in the context, it takes no pass of its own and adds
            to text guidance: the official demonstration has 4 and 1.5, which is 5.5 before the renormalisation.
        guidance_times: Guidance is applied where the (shifted) time is above the first number and at most the second.
        renorm: How the length of the guided velocity is brought back, see `uae.models.bagel.guidance.Guidance`.
        renorm_min: The smallest factor of that, from 0 to 1.
        shift: Timestep shift s: t becomes s t / (1 + (s - 1) t).
        rows: Number of images per pass, 1 or more. It bounds memory and changes nothing else.
        placement: Device and dtype of the autoencoder. The network itself has those of ``reading``.
    """

    height: int = 512
    width: int = 512
    steps: int = 49
    guidance: float = 4.0
    image_guidance: float = 1.0
    guidance_times: tuple[float, float] = (0.0, 1.0)
    renorm: Renorm = "global"
    renorm_min: float = 0.0
    shift: float = 3.0
    rows: int = 8
    placement: Placement = Placement()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of its range.
        """
        for key in ("steps", "rows"):
            if getattr(self, key) < 1:
                raise ValueError(f"rendering.{key}={getattr(self, key)}; allowed: 1 or more; change {KEY}.{key}")
        if not self.shift > 0:
            raise ValueError(f"rendering.shift={self.shift}; allowed: above 0; change {KEY}.shift")
        low, high = self.guidance_times
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"rendering.guidance_times={[low, high]}; allowed: two numbers from 0 to 1, the first below the second; change "
                f"{KEY}.guidance_times"
            )
        _ = self.mix  # raises for what is out of its range

    @property
    def mix(self) -> Guidance:
        """How velocities are combined where guidance is applied."""
        return Guidance(self.guidance, self.image_guidance, self.renorm, self.renorm_min)

    @property
    def times(self) -> list[float]:
        """The times before every step, from 1 (noise) on."""
        even = [1 - step / self.steps for step in range(self.steps)]
        return [self.shift * t / (1 + (self.shift - 1) * t) for t in even]

    def guided_at(self, t: float) -> bool:
        """Whether guidance is applied at a time."""
        return self.guidance > 1 and self.guidance_times[0] < t <= self.guidance_times[1]


class BagelRenderer:
    """Draws captions with the network that captions; implements `uae.types.Renderer`.

    Row n depends on condition n and seed n only: every row draws its noise from its own generator on the CPU. Its times are
    those of a flow-matching scheduler of diffusers, which `uae.models.flow.policy.FlowPolicy` puts its random steps into.

    Args:
        learner: The network, which is also the captioner's.
        autoencoder: FLUX's ``AutoencoderKL``, frozen.
        rendering: Settings.

    Raises:
        ValueError: The network cannot draw images of that size.
    """

    def __init__(self, learner: Learner[BagelPolicy], autoencoder: Any, rendering: BagelRendering) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.learner, self.autoencoder, self.rendering = learner, autoencoder, rendering
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=rendering.shift)
        self.device: torch.device | None = None
        config = learner.network.base.config
        side = config.latent_patch * 2 ** (len(autoencoder.config.block_out_channels) - 1)
        for key in ("height", "width"):
            pixels = getattr(rendering, key)
            if pixels < side or pixels % side or pixels > side * config.latent_side:
                raise ValueError(
                    f"rendering.{key}={pixels}; allowed: multiples of {side} up to {side * config.latent_side}; change {KEY}.{key}"
                )
        self.grid = rendering.height // side, rendering.width // side
        autoencoder.requires_grad_(False).eval()

    def modules(self) -> list[nn.Module]:
        """The frozen network that takes part in drawing: the autoencoder."""
        return [self.autoencoder]

    def to(self, device: Any) -> BagelRenderer:
        """Move the network, and the autoencoder to where its placement says; images come out on ``device``."""
        self.device = torch.device(device)
        self.learner.to(self.device)
        settle(self.modules(), self.rendering.placement, self.device)
        return self

    @property
    def home(self) -> torch.device:
        """The device of the images that `render` returns."""
        return self.device or self.learner.network.banned_ids.device

    def render(self, condition: PromptCondition, seeds: Sequence[int], grad: bool = False, last: int | None = None) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1], float32, by deterministic steps.

        Args:
            condition: The prompts of N images.
            seeds: One seed per image; equal seeds start from equal noise.
            grad: Whether to keep the graph.
            last: With ``grad``, number of steps, counted from the last, that the gradient goes through; None is all steps.
        """
        if len(seeds) != len(condition):
            raise ValueError(f"{len(condition)} conditions but {len(seeds)} seeds")
        if last is not None and last < 1:
            raise ValueError(f"last={last} denoising steps with a gradient; allowed: 1 or more, or None for all")
        images: list[Tensor] = [torch.empty(0)] * len(condition)
        for rows, drawn in self.calls(condition, lambda rows: Call(generators_of([seeds[row] for row in rows])), grad, last):
            for row, image in zip(rows, drawn, strict=True):
                images[row] = image
        return torch.stack(images).float().to(self.home)

    def calls(
        self, condition: PromptCondition, start: Callable[[list[int]], Call], grad: bool = False, last: int | None = None
    ) -> list[tuple[list[int], Tensor]]:
        """Draw all rows of a condition, see `uae.models.renderers.diffusers.DiffusersRenderer.calls`.

        A call from noise computes its prompts once. A call from given latents, of which log-probs are made, computes them in
        every step together with the latents, so that numbers are the same with and without gradient and on a sharded network.
        """
        with torch.set_grad_enabled(grad):
            return [(rows, self._draw(condition.index(rows).cut(), start(rows), grad, last)) for rows in self._batches(condition)]

    def colours(self, drawn: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1], float32, from what the autoencoder returns."""
        return drawn.float()

    def _batches(self, condition: PromptCondition) -> list[list[int]]:
        """The numbers of the rows of each pass: prompts of similar length, because an image has many more tokens."""
        lengths = (condition.mask_NL.sum(1) + self.grid[0] * self.grid[1]).tolist()
        most = self.rendering.rows
        groups = alike(lengths, fewest=8, share=0.75)
        return [group[start : start + most] for group in groups for start in range(0, len(group), most)]

    def _draw(self, prompts: PromptCondition, start: Call, grad: bool, last: int | None) -> Tensor:
        scheduler, network = copy.deepcopy(self.scheduler), self.learner.network
        x_NLP, remembered, acts = self._first(start), None, start.latents is None and not grad
        with start.during(SimpleNamespace(scheduler=scheduler)), merged(network.model) if acts else nullcontext():
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / self.rendering.steps, self.rendering.steps))
            times = [time.item() / scheduler.config.num_train_timesteps for time in scheduler.timesteps]
            if acts:
                remembered = network.remember(prompts)
            for number, (t, time) in enumerate(zip(times, scheduler.timesteps, strict=True)):
                with torch.set_grad_enabled(grad and number >= len(times) - (last or len(times))):
                    velocity = self._velocity(prompts, x_NLP, t, remembered)
                    x_NLP = scheduler.step(velocity, time, x_NLP, return_dict=False)[0]
        return x_NLP if start.output_type == "latent" else self._decoded(x_NLP, grad)

    def _first(self, start: Call) -> Tensor:
        if start.latents is not None:
            return start.latents.to(self.home)
        assert start.generators is not None, "a call has latents or generators"
        shape = self.grid[0] * self.grid[1], self.learner.network.base.config.latent_width
        return torch.stack([torch.randn(shape, generator=generator) for generator in start.generators]).to(self.home)

    def _velocity(self, prompts: PromptCondition, x_NLP: Tensor, t: float, remembered: Any) -> Tensor:
        """The velocity at a time, with guidance where that is applied."""
        network, t_N = self.learner.network, torch.full((len(x_NLP),), t, device=x_NLP.device)
        c_NLP: Tensor = network(prompts, x_NLP, t_N, self.grid[0], remembered)
        if not self.rendering.guided_at(t):
            return c_NLP
        u_NLP: Tensor = network(prompts.without_text(), x_NLP, t_N, self.grid[0])
        return self.rendering.mix(c_NLP, u_NLP, c_NLP)

    def _decoded(self, x_NLP: Tensor, grad: bool) -> Tensor:
        """Latents to images in [0, 1]."""
        vae, placement = self.autoencoder, self.rendering.placement
        work = working_device(placement, self.home)
        latents_NCHW = unpatched(x_NLP, self.grid[0], self.learner.network.base.config.latent_patch)
        latents_NCHW = latents_NCHW / vae.config.scaling_factor + vae.config.shift_factor
        if grad and placement.offload and work.type != "cpu":
            raise ValueError(f"the backward pass needs the autoencoder on its device; set {KEY}.placement.offload to false")
        with at_work([vae], placement, self.home):
            images = vae.decode(latents_NCHW.to(work, vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)
