"""Checks of what trains: gradients reach it and nothing else, nothing else changes, and a saved state is all that there is."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from uae.check.parts.verdicts import Check, Found, Precision, at_most, not_applicable, ratio_gap
from uae.check.parts.weights import digests, tensors_of
from uae.module import UnifiedGRPO
from uae.rollout import Experience, Plan, Segment, roll_out
from uae.types import ImageBatch

STEPS = 2  # the first moves one factor of a low-rank adapter away from 0, the second gives the other one a gradient
RATE = 1e-3  # learning rate of the steps, so that they show whatever the schedule begins with


def named(names: list[str], most: int = 2) -> str:
    """Some names of a list, for a reason."""
    return ", ".join(names[:most]) + f", and {len(names) - most} more" * (len(names) > most)


def rolled_out(module: UnifiedGRPO, batch: ImageBatch, plan: Plan, step: int) -> Experience:
    """A rollout of the module, all of its parts and rewards included."""
    return roll_out(module.umm, module.reward, batch, plan, step, module.references)


@dataclass
class Training:
    """A few optimizer steps of a module that is built and placed, and what was before them.

    Args:
        module: The module under test.
        batch: Images.
        plan: Settings of the rollouts.
        precision: What the module computes in.
    """

    module: UnifiedGRPO
    batch: ImageBatch
    plan: Plan
    precision: Precision
    seen: dict[str, float] = field(default_factory=dict)  # largest gradient of every tensor, over all steps

    @cached_property
    def experience(self) -> Experience:
        """The rollout that is trained on, before any step."""
        return rolled_out(self.module, self.batch, self.plan, 0)

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """Log-probs of every segment before any step."""
        return {name: self._logprobs(one) for name, one in self.experience.segments.items()}

    @cached_property
    def before(self) -> dict[str, str]:
        """Fingerprints of everything that does not train, before any step."""
        return digests(self._frozen())

    @cached_property
    def stepped(self) -> bool:
        """Takes the steps, on first use: every other caption is made likelier, the others less likely, whatever the reward says."""
        assert self.start, "nothing trains"
        assert self.before is not None
        optimizer = self._optimizer()
        for group in optimizer.param_groups:
            group["lr"] = RATE
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            for segment in self.experience.segments.values():
                sign_R1 = (1 - 2 * (torch.arange(len(segment.actions)) % 2)).to(self.module.device)[:, None]
                (sign_R1 * segment.logprobs() * segment.actions.mask_RS).sum().backward()
            for name, tensor in self._tensors().items():
                if tensor.grad is not None:
                    self.seen[name] = max(self.seen.get(name, 0.0), float(tensor.grad.abs().max()))
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return True

    def _optimizer(self) -> Optimizer:
        made: Any = self.module.configure_optimizers()
        optimizer: Optimizer = made if isinstance(made, Optimizer) else made["optimizer"]
        return optimizer

    def _tensors(self) -> dict[str, Tensor]:
        return tensors_of(self.module.umm, self.module.reward, self.module.unified_score)

    def _frozen(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._tensors().items() if not tensor.requires_grad}

    @torch.no_grad()
    def _logprobs(self, segment: Segment[Any]) -> Tensor:
        return segment.logprobs()

    def checks(self) -> list[Check]:
        """All checks but the one of a saved state."""
        return [
            Check("training: gradients arrive", self.gradients_arrive),
            Check("training: nothing else trains", self.nothing_else),
            Check("training: frozen bytes", self.frozen_bytes),
            Check("reference: value", self.reference_value),
            Check("reference: restores", self.reference_restores),
        ]

    def gradients_arrive(self) -> Found:
        """Every tensor that trains gets a gradient in one of the steps, which may be 0 only where it has no effect on log-probs.

        The last block of a diffusion transformer computes a query for the caption, for example, which nothing reads.
        """
        assert self.stepped
        trains = {name: tensor for name, tensor in self._tensors().items() if tensor.requires_grad}
        unreached = [name for name in trains if name not in self.seen]
        idle = [name for name in trains if self.seen.get(name) == 0]
        if idle and self._matter([trains[name] for name in idle]):
            unreached += idle
        if not trains:
            return at_most(1, 0, "nothing trains")
        return at_most(len(unreached), 0, f"of {len(trains)} tensors that train no gradient reaches {named(unreached)}")

    @torch.no_grad()
    def _matter(self, tensors: list[Tensor]) -> bool:
        """Whether log-probs change if some weights do."""
        segments, kept = self.experience.segments.values(), [tensor.clone() for tensor in tensors]
        before = [segment.logprobs() for segment in segments]
        for tensor in tensors:
            tensor.add_(0.1)
        after = [segment.logprobs() for segment in segments]
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def nothing_else(self) -> Found:
        """The optimizer holds the tensors that train and no others, and no others have a gradient."""
        assert self.stepped
        held = {id(weight) for group in self._optimizer().param_groups for weight in group["params"]}
        trains = {name: tensor for name, tensor in self._tensors().items() if tensor.requires_grad}
        own = {id(tensor) for tensor in trains.values()}
        wrong = [name for name, tensor in self._tensors().items() if (id(tensor) in held) != (id(tensor) in own)]
        wrong += sorted(self.seen.keys() - trains.keys())
        return at_most(len(wrong) + len(held - own), 0, f"in the optimizer, or with a gradient, on one side only: {named(wrong)}")

    def frozen_bytes(self) -> Found:
        """The steps leave every byte of what does not train as it was."""
        assert self.stepped
        after = digests(self._frozen())
        changed = [name for name in self.before if after.get(name) != self.before[name]]
        return at_most(len(changed), 0, f"of {len(self.before)} frozen tensors the steps changed {named(changed)}")

    @torch.no_grad()
    def reference_value(self) -> Found:
        """Inside ``reference()``, log-probs are those before any step, which outside they are no more."""
        assert self.stepped
        gaps, moved = [], []
        for name, segment in self.experience.segments.items():
            if segment.policy.learner.start is None:
                continue
            mask_RS = segment.actions.mask_RS
            with segment.policy.learner.reference():
                gaps.append(ratio_gap(segment.logprobs(), self.start[name], mask_RS))
            moved.append(ratio_gap(segment.logprobs(), self.start[name], mask_RS))
        if not gaps:
            return not_applicable("the start was not kept (model.init_args.loss.beta is 0)")
        if not float(torch.stack(moved).min()):
            return at_most(float("nan"), 0, "the steps changed no log-prob")
        return at_most(torch.stack(gaps).max(), self.precision.same, "reference() is not the start of the run")

    @torch.no_grad()
    def reference_restores(self) -> Found:
        """After ``reference()``, every byte is as it was before it, and the same tensors train."""
        assert self.stepped
        roots: list[tuple[Any, nn.Module]] = [
            (segment.policy.learner, segment.policy.learner.network)
            for segment in self.experience.segments.values()
            if segment.policy.learner.start is not None
        ]
        if not roots:
            return not_applicable("the start was not kept (model.init_args.loss.beta is 0)")
        wrong: list[str] = []
        for learner, network in roots:
            before = _state(network)
            with learner.reference():
                pass
            after = _state(learner.network)
            wrong += [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        return at_most(len(wrong), 0, f"other after reference() than before: {named(sorted(wrong))}")

    def saved(self) -> tuple[bytes, dict[str, Any]]:
        """The state of the module after the steps, as its checkpoint holds it; and what its next rollout is."""
        assert self.stepped
        checkpoint: dict[str, Any] = {"state_dict": self.module.state_dict()}
        self.module.on_save_checkpoint(checkpoint)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        return buffer.getvalue(), noted(rolled_out(self.module, self.batch, self.plan, 1))


def _state(network: nn.Module) -> dict[str, tuple[str, bool]]:
    """Bytes of every tensor of a network, and whether it trains."""
    tensors = tensors_of(network)
    return {name: (value, tensors[name].requires_grad) for name, value in digests(tensors).items()}


def noted(experience: Experience) -> dict[str, Any]:
    """What two rollouts are compared by: captions, pixels, and log-probs as the sampler saw them."""
    logp = {name: segment.actions.logp_RS.cpu() for name, segment in experience.segments.items()}
    return {"texts": experience.rollout.texts, "pixels": experience.reconstructions_NCHW.cpu(), "logp": logp}


def resumed(module: UnifiedGRPO, state: bytes, batch: ImageBatch, plan: Plan, expected: dict[str, Any]) -> Found:
    """The next rollout of a module that was built anew and got a saved state.

    Args:
        module: A module of the same configuration, built and placed.
        state: What `Training.saved` made.
        batch: The same images.
        plan: The same settings.
        expected: The rollout of the module that was saved.
    """
    checkpoint = torch.load(io.BytesIO(state), weights_only=True, map_location=module.device)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    found = noted(rolled_out(module, batch, plan, 1))
    if found["texts"] != expected["texts"]:
        other = sum(a != b for a, b in zip(found["texts"], expected["texts"], strict=True))
        return at_most(other, 0, "captions of the next rollout that are others after saving and loading")
    gaps = [(found["pixels"] - expected["pixels"]).abs().max()]
    gaps += [(found["logp"][name] - logp_RS).abs().max() for name, logp_RS in expected["logp"].items()]
    return at_most(torch.stack([gap.float() for gap in gaps]).max(), 1e-4, "pixels or log-probs of the next rollout")
