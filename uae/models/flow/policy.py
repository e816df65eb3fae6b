"""A diffusion pipeline as a policy: denoising steps of a flow-matching model are actions with log-probs.

Both sampling and log-probs call the pipeline itself and only replace its scheduler's step. So guidance, masks, embeddings
and time shifts are the same in both, and the policy ratio is one before the first update.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from uae.learner import Learner
from uae.models.bagel.renderer import BagelRenderer
from uae.models.conditioners.states import EmbeddingCondition
from uae.models.flow import sde
from uae.models.flow.network import FlowNetwork
from uae.models.flow.steps import DrawingSteps, ReplayingSteps
from uae.models.pipelines.calls import Call, generators_of
from uae.models.pipelines.steps import check_flow, check_steps, stepping
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.types import Trajectory

Noise = Literal["flow", "dance", "cps"]
Ratio = Literal["density", "centred", "ratio_norm"]
Update = Literal["guided", "conditional"]
FlowRenderer = DiffusersRenderer | BagelRenderer


@dataclass(frozen=True)
class Exploration:
    """Which denoising steps are random, and how much. These settings *define* the policy.

    Args:
        noise: Kind of random step: "flow" (Flow-GRPO), "dance" (DanceGRPO) or "cps" (Flow-CPS), see `uae.models.flow.sde`.
        noise_level: Strength of the noise, above 0: a of Flow-GRPO, eta of DanceGRPO (0.3 in its paper), or eta of Flow-CPS (at
            most 1).
        window: S, how many consecutive steps are random and trained; the others are deterministic. None is all but the
            last, which is always deterministic.
        start: First step of the window: a number, or "random", drawn for every row from its seed.
        guidance_in_update: Which velocity log-probs are computed from. "guided": the guided velocity, from which the sample
            was drawn; exact, but it takes two passes with gradient. "conditional": the velocity without guidance; half the
            memory, but biased, because the sample was drawn from another policy. Without guidance both are the same.
        ratio: What policy ratios are taken of. "density": of the densities of steps. "centred": without the term that pushes
            all ratios below 1, so that clipping is symmetric; the first gradient after a rollout is the same. "ratio_norm": its
            logarithm times the standard deviation of the step, so that ratios of all steps spread alike (GRPO-Guard's
            RatioNorm). Steps then weigh by their standard deviation in the gradient, and clip ranges and KL coefficients are in
            that unit. GRPO-Guard also divides the loss of a step by the step's length; that is left out, as it is one factor
            for all steps of an even schedule, which AdamW does not see. See `uae.models.flow.sde.centred_log_prob`.
    """

    noise: Noise = "flow"
    noise_level: float = 0.7
    window: int | None = None
    start: int | Literal["random"] = 0
    guidance_in_update: Update = "guided"
    ratio: Ratio = "density"

    @property
    def sde(self) -> sde.SDE:
        """The formula of the random step."""
        kinds: dict[Noise, Callable[[float], sde.SDE]] = {"flow": sde.FlowSDE, "dance": sde.DanceSDE, "cps": sde.FlowCPS}
        return kinds[self.noise](self.noise_level)


@dataclass(frozen=True, kw_only=True)
class FlowTrajectory(Trajectory[Any]):
    """The trained denoising steps of N rows; ``actions_RS`` ``[N, S, ...]`` are the latents *after* each step.

    The condition is detached. To get a gradient with respect to it, replace it by one with a graph.
    """

    start_N: Tensor  # [N, ...] latents before the first trained step
    final_N: Tensor  # [N, ...] latents after the last step of all
    first_N: Tensor  # int64, number of the first trained step
    mean_RS: Tensor | None = None  # [N, S, ...] means of the trained steps under the weights that drew; None: ratios of densities

    def select(self, rows: list[int]) -> FlowTrajectory:
        """The trajectories of some rows, in the order given."""
        chosen: FlowTrajectory = super().select(rows)
        mean_RS = None if self.mean_RS is None else self.mean_RS[rows]
        return replace(chosen, start_N=self.start_N[rows], final_N=self.final_N[rows], first_N=self.first_N[rows], mean_RS=mean_RS)


class FlowPolicy:
    """A renderer whose denoiser learns; implements `uae.types.ImagePolicy`.

    Log-probs are in nats per latent dimension, see `uae.models.flow.sde.log_prob`: clip ranges are 1e-5 to 1e-4.

    Args:
        renderer: The renderer of a flow-matching pipeline. Its transformer becomes ``learner.network.model`` and is trained
            in the dtype it was loaded in. Or that of BAGEL, whose network has the captioner's learner.
        exploration: Which denoising steps are random, how strong their noise is, and which of them train.
    """

    learner: Learner[Any]

    def __init__(self, renderer: FlowRenderer, exploration: Exploration = Exploration()) -> None:
        if isinstance(renderer, DiffusersRenderer):
            check_flow(renderer.pipe)
            check_steps(renderer.pipe, renderer.rendering.guidance > 1)
        _check(exploration, renderer)
        self.renderer, self.exploration = renderer, exploration
        steps = renderer.rendering.steps - 1
        self.window = steps if exploration.window is None else exploration.window
        if isinstance(renderer, BagelRenderer):
            self.learner = renderer.learner
            return
        install = partial(setattr, renderer.pipe, "transformer")
        self.learner = Learner(FlowNetwork(renderer.pipe.transformer), install)
        install(self.learner.network)

    def modules(self) -> list[nn.Module]:
        """The frozen networks of the pipeline that take part in drawing: the autoencoder, but not the trained denoiser."""
        return [module for module in self.renderer.modules() if module is not self.learner.network]

    def to(self, device: torch.device | str) -> FlowPolicy:
        """Move the network, the autoencoder, and the frozen copy of the initial weights if there is one."""
        self.renderer.to(device)
        self.learner.to(device)
        return self

    def render(self, condition: Any, seeds: Sequence[int], grad: bool = False, last: int | None = None) -> Tensor:
        """Images ``[N, 3, H, W]`` by the pipeline's own deterministic scheduler, see `DiffusersRenderer.render`."""
        return self.renderer.render(condition, seeds, grad, last)

    @torch.no_grad()
    def sample(self, condition: Any, seeds: Sequence[int]) -> FlowTrajectory:
        """One trajectory per row. The initial noise is that of `render`; later noise comes from the same generator."""
        if len(seeds) != len(condition):
            raise ValueError(f"{len(condition)} conditions but {len(seeds)} seeds")
        condition, first_N = _detached(condition), torch.tensor([self._first(seed) for seed in seeds])
        draws: list[DrawingSteps] = []

        def start(rows: list[int]) -> Call:
            generators = generators_of([seeds[row] for row in rows])
            first = first_N[rows].tolist()
            draws.append(DrawingSteps(self.exploration.sde, generators, first, self.window, self.exploration.ratio != "density"))
            return Call(generators, during=partial(stepping, advance=draws[-1]), output_type="latent")

        parts = self.renderer.calls(condition, start)
        drawn = [(rows, draw) for (rows, _), draw in zip(parts, draws, strict=True)]
        logp_NS = _in_order([(rows, draw.logprobs()) for rows, draw in drawn])
        taken = FlowTrajectory(
            mask_RS=torch.ones_like(logp_NS),
            logp_RS=logp_NS,
            entropy_RS=_in_order([(rows, draw.entropies()) for rows, draw in drawn]),
            condition=condition,
            actions_RS=_in_order([(rows, draw.actions()) for rows, draw in drawn]),
            start_N=_in_order([(rows, draw.starts()) for rows, draw in drawn]),
            final_N=_in_order([(rows, draw.final) for rows, draw in drawn]),
            first_N=first_N,
            mean_RS=None if self.exploration.ratio == "density" else _in_order([(rows, draw.means()) for rows, draw in drawn]),
        )
        if self._updating is self.renderer:
            return taken
        mean_NS, std_NS = self.moments(taken)
        taken = replace(taken, mean_RS=None if taken.mean_RS is None else mean_NS)
        return replace(taken, logp_RS=self._scored(taken, mean_NS, std_NS))

    def logprobs(self, trajectory: FlowTrajectory) -> Tensor:
        """Log-probs ``[N, S]`` of the trained steps under the current weights, in nats per latent dimension.

        All steps are in one graph. To save memory, set ``learner.network.gradient_checkpointing``, train fewer steps
        (`Exploration.window`), or pass fewer rows.

        With another `Exploration.ratio` than "density" they are log-densities at the weights that drew only. Elsewhere they are
        linear in the mean of the step, for the policy and for the reference alike, so that differences between both are 0
        where the weights are equal.
        """
        return self._scored(trajectory, *self.moments(trajectory))

    def _scored(self, trajectory: FlowTrajectory, mean_NS: Tensor, std_NS: Tensor) -> Tensor:
        """Log-probs ``[N, S]`` of the trained steps, given their means and standard deviations under the current weights."""
        actions, mean, std = trajectory.actions_RS.flatten(0, 1), mean_NS.flatten(0, 1), std_NS.flatten()
        if self.exploration.ratio == "density":
            logp = sde.log_prob(actions, mean, std)
        else:
            assert trajectory.mean_RS is not None, "`sample` has recorded it"
            old_mean = trajectory.mean_RS.flatten(0, 1)
            logp = sde.centred_log_prob(actions, mean, old_mean, std, self.exploration.ratio == "ratio_norm")
        return logp.view_as(std_NS).masked_fill(trajectory.mask_RS == 0, 0.0)

    def divergence(self, trajectory: FlowTrajectory) -> Tensor:
        """Exact KL divergence ``[N, S]`` from the reference, at each trained step, in nats per latent dimension."""
        with torch.no_grad(), self.learner.reference():
            reference_NS, _ = self.moments(trajectory)
        mean_NS, std_NS = self.moments(trajectory)
        divergence = sde.divergence(mean_NS.flatten(0, 1), reference_NS.flatten(0, 1), std_NS.flatten())
        return divergence.view_as(std_NS).masked_fill(trajectory.mask_RS == 0, 0.0)

    def moments(self, trajectory: FlowTrajectory) -> tuple[Tensor, Tensor]:
        """Means ``[N, S, ...]`` and standard deviations ``[N, S]`` of the trained steps under the current weights."""
        moments = []
        for first in trajectory.first_N.unique().tolist():  # a call goes through the same steps in all its rows
            rows = (trajectory.first_N == first).nonzero()[:, 0].tolist()
            moments += [([rows[n] for n in part], mean, std) for part, mean, std in self._replay(trajectory.select(rows), first)]
        return _in_order([(rows, mean) for rows, mean, _ in moments]), _in_order([(rows, std) for rows, _, std in moments])

    def _replay(self, trajectory: FlowTrajectory, first: int) -> list[tuple[list[int], Tensor, Tensor]]:
        """Rows, means and standard deviations per micro-batch of trajectories whose first trained step is the same."""
        replays: list[ReplayingSteps] = []

        def start(rows: list[int]) -> Call:
            replays.append(ReplayingSteps(self.exploration.sde, trajectory.actions_RS[rows], first))
            during = partial(stepping, advance=replays[-1], first=first, stop=first + trajectory.actions_RS.shape[1])
            return Call(None, trajectory.start_N[rows], during, first=first, output_type="latent")

        parts = self._updating.calls(trajectory.condition, start, torch.is_grad_enabled())
        return [
            (rows, torch.stack(replay.means, dim=1), torch.tensor(replay.stds).to(replay.means[0]).expand(len(rows), -1))
            for (rows, _), replay in zip(parts, replays, strict=True)
        ]

    @torch.no_grad()
    def pixels(self, trajectory: FlowTrajectory) -> Tensor:
        """The images ``[N, 3, H, W]`` in [0, 1] that the trajectories end in, float32."""

        def start(rows: list[int]) -> Call:
            during = partial(stepping, advance=_never, stop=0)
            return Call(None, trajectory.final_N[rows], during)

        decoded = _in_order(self._unguided.calls(trajectory.condition, start))
        return self.renderer.colours(decoded).to(self.renderer.home)

    @property
    def _unguided(self) -> FlowRenderer:
        """The same renderer without classifier-free guidance."""
        renderer: Any = copy.copy(self.renderer)
        renderer.rendering = replace(renderer.rendering, guidance=1.0)
        unguided: FlowRenderer = renderer
        return unguided

    @property
    def _updating(self) -> FlowRenderer:
        """The renderer whose velocities define log-probs: with or without guidance, see `Exploration.guidance_in_update`."""
        guided = self.exploration.guidance_in_update == "guided" or self.renderer.rendering.guidance <= 1
        return self.renderer if guided else self._unguided

    def _first(self, seed: int) -> int:
        """Number of the first trained step of a row with this seed."""
        if self.exploration.start != "random":
            return self.exploration.start
        return random.Random(seed).randrange(self.renderer.rendering.steps - self.window)


def _check(exploration: Exploration, renderer: FlowRenderer) -> None:
    """Raise ValueError for settings out of range, and for a denoiser whose placement does not allow training."""
    for key, allowed in (("noise", Noise), ("guidance_in_update", Update), ("ratio", Ratio)):
        if (value := getattr(exploration, key)) not in get_args(allowed):
            key = f"model.init_args.exploration.{key}"
            raise ValueError(f"{key}={value!r}; allowed: {', '.join(get_args(allowed))}; change {key}")
    _ = exploration.sde  # raises for a noise level out of range
    steps, start = renderer.rendering.steps, exploration.start
    first = 0 if start == "random" else start
    window = steps - 1 if exploration.window is None else exploration.window
    if start != "random" and not isinstance(start, int):
        raise ValueError(
            f"model.init_args.exploration.start={start!r}; allowed: random, or a number; change model.init_args.exploration.start"
        )
    if window < 1 or first < 0 or first + window > steps - 1:
        raise ValueError(
            f"model.init_args.exploration.window={exploration.window} from step {start} of {steps} denoising steps; allowed: 1 to "
            f"{steps - 1} steps in all, as the last is deterministic; change model.init_args.exploration.window or "
            "model.init_args.system.init_args.rendering.steps"
        )
    placement = renderer.rendering.placement
    if isinstance(renderer, BagelRenderer):  # it is the autoencoder's, which does not train
        return
    if placement.offload or placement.device is not None or placement.dtype == "float8":
        raise ValueError(
            f"model.init_args.system.init_args.rendering.placement={placement}, but the denoiser trains; allowed: offload false, "
            "device null (the trainer's) and dtype float32, bfloat16 or float16; change "
            "model.init_args.system.init_args.rendering.placement"
        )


def _never(number: int, *_: Any) -> Tensor:
    raise AssertionError(f"step {number} of a call that only decodes")


def _in_order(parts: list[tuple[list[int], Tensor]]) -> Tensor:
    """Concatenate the rows of several micro-batches and sort them into the order they had before."""
    order = torch.tensor([row for rows, _ in parts for row in rows])
    return torch.cat([part for _, part in parts])[order.argsort()]


def _detached(condition: Any) -> Any:
    if not isinstance(condition, EmbeddingCondition):
        return condition
    pooled = None if condition.pooled_NP is None else condition.pooled_NP.detach()
    return EmbeddingCondition(condition.embeds_NLD.detach(), condition.mask_NL, pooled)
