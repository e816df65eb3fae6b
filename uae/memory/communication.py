"""The bytes that the GPUs of a run send each other for one optimizer step, computed from layer sizes.

Tests compare these numbers with counted bytes. A captioner reads a prompt once and then the captions of its
group, so the blocks of its language model run twice in a pass, and are gathered twice in the forward and twice in the
backward pass. Only the training on captions is counted. The passes of an image policy are left out, as are logged values
and gradient norms (less than 1 kB).
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

DRAWING = r"(^|\.)generation_"  # names of blocks that only the drawing of images uses


@dataclass(frozen=True)
class Exchange:
    """One kind of collective operation.

    Args:
        name: Tensors that are exchanged, and the phase in which this happens.
        kind: "all-gather", "reduce-scatter" or "all-reduce".
        whole: Bytes of the whole tensors, padding included, in one pass over the policy.
        times: Passes per optimizer step; a fraction if one rollout feeds several steps.
        members: Number of processes that take part in one operation.
        apart: Distance between the ranks of two successive members; 1 is neighbouring ranks.
    """

    name: str
    kind: str
    whole: int
    times: float
    members: int
    apart: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends (and receives) per optimizer step with the ring algorithm."""
        passes = 2 if self.kind == "all-reduce" else 1
        return self.whole * self.times * passes * (self.members - 1) / self.members

    def leaves(self, per_node: int) -> bool:
        """Whether the members are on more than one machine, if a machine has ``per_node`` GPUs."""
        return self.members * self.apart > per_node

    def seconds(self, local_gbs: float, network_gbs: float, per_node: int) -> float:
        """Seconds per optimizer step at full bandwidth, if nothing overlaps with computation.

        Args:
            local_gbs: Bandwidth from a GPU to the others of its machine, in GB/s.
            network_gbs: Bandwidth from a GPU to other machines, in GB/s. It counts if members are on several machines.
            per_node: Number of GPUs of a machine.
        """
        return self.sent / (network_gbs if self.leaves(per_node) else local_gbs) / 1e9


def communication(
    policy: CaptionPolicy,
    reference: Network | None,
    processes: Processes,
    mini_batches: int,
    batches_per_rollout: int,
) -> tuple[Exchange, ...]:
    """All collective operations of one optimizer step.

    Args:
        policy: The captioner's network on any device, with the weights that train unfrozen.
        reference: A frozen copy of the policy, which is run once per mini-batch of a rollout; None if there is no copy.
        processes: Number of processes, strategy and dtypes of the run.
        mini_batches: Number of mini-batches that a rollout is divided into.
        batches_per_rollout: Number of training batches that a rollout feeds: ``mini_batches * num_iterations``.
    """
    if processes.count == 1:
        return ()
    if not processes.sharded:
        gradients = sum(weight.numel() * weight.element_size() for weight in policy.parameters() if weight.requires_grad)
        return (Exchange("gradients", "all-reduce", gradients, 1, processes.count),)
    rollouts, n = processes.accumulate / batches_per_rollout, processes.shards
    parts = _Parts(policy, processes, policy.tower_learns)
    copies = processes.count // n
    kinds = [("gradients", "reduce-scatter", parts.reduced, 1.0, n, 1)]
    if copies > 1:
        kinds.append(("gradients, between copies", "all-reduce", parts.reduced // n, 1.0, copies, n))
    gathers = {
        "policy, rollout": (parts.everything, rollouts),
        "policy, forward pass": (parts.forward, processes.accumulate),
        "policy, backward pass": (parts.backward, processes.accumulate),
        "policy, prefetched": (parts.prefetched, rollouts),
    }
    if reference is not None:
        copy = _Parts(reference, processes, policy.tower_learns)
        gathers["reference copy"] = copy.forward, rollouts * mini_batches
    everything = [Exchange(name, "all-gather", whole, times, n) for name, (whole, times) in gathers.items() if whole]
    return tuple(exchange for exchange in [*everything, *(Exchange(*kind) for kind in kinds)] if exchange.members > 1)


class _Parts:
    """Bytes of the collectives in one pass over a sharded policy.

    ``everything`` is gathered for a rollout, ``forward`` and ``backward`` in the passes of a training batch, and ``reduced``
    are the bytes of gradients per optimizer step. ``looks`` says whether the image tower runs in these passes; one that is frozen
    runs in the rollout only.
    """

    def __init__(self, policy: Network, processes: Processes, looks: bool) -> None:
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
        trained = any(weight.requires_grad for weights in sees for weight in weights)
        self.forward = gather(root) + twice + (once if looks else 0)
        self.backward = twice + (once if trained else 0)
        first: list[nn.Parameter] = []
        if not policy.base.get_input_embeddings().weight.requires_grad:
            # The backward pass of the captions sends no gradient below the first text block. So FSDP does not release
            # its weights, and the backward pass of the prompt need not gather them again.
            first = texts[0]
            self.backward -= gather(first)
        # Where the embeddings train, the backward pass of the prompt gathers the first text block. Before it, FSDP prefetches the
        # block that ran in front of it. In the first update after a rollout this is the last text block of the rollout.
        self.prefetched = 0 if first or looks else gather(texts[-1])
        self.reduced = reduce(policy.parameters())
        if processes.accumulate > 1:
            # Text blocks are reduced twice in the last batch: the gradients accumulated in earlier batches after the backward
            # pass of the captions, its own gradients after that of the prompt.
            self.reduced += sum(map(reduce, texts)) - reduce(first)


def padded(weight: Tensor, n: int) -> int:
    """Number of values of a weight with the padding that FSDP sends.

    Every process gets the same number of rows, so 32 rows over 64 processes are padded to 64.
    """
    if weight.ndim == 0 or weight.numel() == 0:
        return weight.numel()
    rows = weight.shape[0]
    return -(-rows // n) * n * (weight.numel() // rows)
