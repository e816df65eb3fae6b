"""What the GPUs of a run send each other for one optimizer step, from architectures alone.

Counted as the sharded policy does it, and tested against counted bytes: a captioner reads a prompt once and its group's
captions behind it, so the blocks of its language model run twice in a pass and are gathered twice, forward and backward.
Captions only: what an image policy reads while it trains is left out, as are logged values and norms (less than 1 kB).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from uae.learner import Network
from uae.memory.processes import Processes
from uae.models.captioners.policy import CaptionPolicy
from uae.strategy import blocks

DRAWING = r"(^|\.)generation_"  # names of blocks that only images pass, in a network that captions and draws


@dataclass(frozen=True)
class Exchange:
    """One kind of collective.

    Args:
        name: What is exchanged, and when.
        kind: "all-gather", "reduce-scatter" or "all-reduce".
        whole: Bytes of what the members share, padding included, per collective pass over the policy.
        times: Passes per optimizer step; a fraction where a rollout feeds several steps.
        members: Processes that take part.
        apart: Members are so many ranks apart; 1 is neighbours.
    """

    name: str
    kind: str
    whole: int
    times: float
    members: int
    apart: int = 1

    @property
    def sent(self) -> float:
        """Bytes each GPU sends (and receives) per optimizer step, in a ring."""
        passes = 2 if self.kind == "all-reduce" else 1
        return self.whole * self.times * passes * (self.members - 1) / self.members

    def leaves(self, per_node: int) -> bool:
        """Whether members are on several machines of so many GPUs."""
        return self.members * self.apart > per_node

    def seconds(self, local_gbs: float, network_gbs: float, per_node: int) -> float:
        """Time at full bandwidth, per optimizer step, nothing overlapped.

        Args:
            local_gbs: GB/s that a GPU sends to others of its machine.
            network_gbs: GB/s that a GPU sends to other machines.
            per_node: GPUs of a machine; a collective that leaves it goes at the network's pace.
        """
        return self.sent / (network_gbs if self.leaves(per_node) else local_gbs) / 1e9


def communication(
    policy: CaptionPolicy,
    reference: Network | None,
    processes: Processes,
    mini_batches: int,
    batches_per_rollout: int,
) -> tuple[Exchange, ...]:
    """Everything sent for one optimizer step.

    Args:
        policy: On any device, with what trains unfrozen.
        reference: A frozen copy of it, read once per mini-batch of a rollout.
        processes: How the run is spread out.
        mini_batches: Of a rollout.
        batches_per_rollout: Training batches that a rollout feeds: ``mini_batches * num_iterations``.
    """
    if processes.count == 1:
        return ()
    if not processes.sharded:
        gradients = sum(weight.numel() * weight.element_size() for weight in policy.parameters() if weight.requires_grad)
        return (Exchange("gradients", "all-reduce", gradients, 1, processes.count),)
    rollouts, n = processes.accumulate / batches_per_rollout, processes.shards
    parts = _Parts(policy, processes)
    copies = processes.count // n
    kinds = [("gradients", "reduce-scatter", parts.reduced, 1.0, n, 1)]
    if copies > 1:
        kinds.append(("gradients, between copies", "all-reduce", parts.reduced // n, 1.0, copies, n))
    gathers = {
        "policy, rollout": (parts.everything, rollouts),
        "policy, forward pass": (parts.forward, processes.accumulate),
        "policy, backward pass": (parts.backward, processes.accumulate),
    }
    if reference is not None:
        copy = _Parts(reference, processes)
        gathers["reference copy"] = copy.forward, rollouts * mini_batches
    everything = [Exchange(name, "all-gather", whole, times, n) for name, (whole, times) in gathers.items()]
    return tuple(exchange for exchange in [*everything, *(Exchange(*kind) for kind in kinds)] if exchange.members > 1)


class _Parts:
    """Bytes of one pass over a sharded policy's blocks."""

    def __init__(self, policy: Network, processes: Processes) -> None:
        n, gathered, reduced = processes.shards, processes.gathered_dtype, processes.reduced_dtype
        text = {id(module) for module in policy.base.get_decoder().modules()}
        names = {id(module): name for name, module in policy.named_modules()}
        each = [(list(block.parameters()), id(block) in text, names[id(block)]) for block in blocks(policy)]
        inside = {id(weight) for weights, _, _ in each for weight in weights}
        root = [weight for weight in policy.parameters() if id(weight) not in inside]
        texts = [weights for weights, reads, _ in each if reads]
        sees = [weights for weights, reads, name in each if not reads and not re.search(DRAWING, name)]

        def gather(weights: Iterable[Tensor]) -> int:
            return sum(padded(weight, n) * (gathered or weight.dtype).itemsize for weight in weights)

        def reduce(weights: Iterable[Tensor]) -> int:
            return sum(padded(w, n) * (reduced or w.dtype).itemsize for w in weights if w.requires_grad)

        twice, once = 2 * sum(map(gather, texts)), sum(map(gather, sees))
        self.everything = gather(policy.parameters())
        self.forward = gather(root) + once + twice
        trained = any(weight.requires_grad for weights in sees for weight in weights)
        self.backward = twice + (once if trained else 0)
        first: list[nn.Parameter] = []
        if not policy.base.get_input_embeddings().weight.requires_grad:
            first = texts[0]  # no gradient leaves it behind the captions: it stays gathered for the prompt's pass
            self.backward -= gather(first)
        elif not trained and sees:
            self.backward += gather(sees[-1])  # the block before the first, in advance and in vain
        self.reduced = reduce(policy.parameters())
        if processes.accumulate > 1:  # what earlier batches left goes out behind the captions, the last batch behind the prompt
            self.reduced += sum(map(reduce, texts)) - reduce(first)


def padded(weight: Tensor, n: int) -> int:
    """Values of a weight as it is sent: rows are dealt out evenly, so that 32 rows over 64 processes become 64."""
    if weight.ndim == 0 or weight.numel() == 0:
        return weight.numel()
    rows = weight.shape[0]
    return -(-rows // n) * n * (weight.numel() // rows)
