"""Fully sharded training (FSDP2) as a Lightning strategy, ``trainer.strategy: fsdp2``.

What it adds to Lightning's `ModelParallelStrategy`: every process is data-parallel, copies of the weights may be spread
over fewer processes than there are (`shard_size`), gradients are reduced once per accumulation window, checkpoints hold
what trains and nothing else, and a rollout gathers every weight once (`unsharded`). Works with NCCL and, for tests, with
gloo on a CPU. What it costs is in docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from uae.checkpoints.sharded import ShardedCheckpoints


def shard(policy: nn.Module, mesh: DeviceMesh, precision: MixedPrecisionPolicy | None = None) -> None:
    """Shard a policy in place, bottom-up: every block of its outermost module lists, then the rest as the root.

    Args:
        policy: The root. Whatever needs its own weights must happen in its ``forward`` or inside `unsharded`.
        mesh: One dimension, over which weights are divided; or two, of which the first holds copies.
        precision: Of computing and reducing. With a ``param_dtype``, what trains is kept in float32.
    """
    precision = precision or MixedPrecisionPolicy()
    if precision.param_dtype is not None:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    for block in blocks(policy):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    frozen = not any(parameter.requires_grad for parameter in policy.parameters())
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=frozen)  # no backward pass would


def blocks(module: nn.Module) -> list[nn.Module]:
    """Text layers, vision blocks and the like."""
    if isinstance(module, nn.ModuleList):
        return [block for block in module if next(block.parameters(), None) is not None]
    return [block for child in module.children() for block in blocks(child)]


@contextmanager
def unsharded(root: nn.Module | None) -> Iterator[None]:
    """Inside, the weights of a sharded module are whole: gathered once, however many forward passes follow.

    A module that is not sharded stays as it is; None is no module at all. All ranks must enter; inside, nothing is
    communicated, so that ranks may run different numbers of forward passes. Not for use between a backward pass and its
    optimizer step.
    """
    if not isinstance(root, FSDPModule):
        yield
        return
    root._get_fsdp_state()._lazy_init()  # or the first block to run would take itself for the root
    modules = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()  # the root, too: its old weights would survive the next optimizer step
            module.set_reshard_after_forward(module is not root, recurse=False)


def refuse_other_sharding(strategy: Any) -> None:
    """Raise for strategies of Lightning that divide weights, but know neither rollouts nor frozen parts.

    ``fsdp`` would flatten frozen decoders with what trains and gather at every sampled token, ``deepspeed`` likewise;
    `ModelParallelStrategy` alone is tensor-parallel over all devices by default, so that nothing would be divided.

    Raises:
        ValueError: The strategy is one of these.
    """
    ours = isinstance(strategy, FSDP2Strategy)
    if not ours and isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}; allowed: auto, ddp, fsdp2 (uae.strategy.FSDP2Strategy, "
            "configs/trainer/fsdp2.yaml)"
        )


class FSDP2Strategy(ShardedCheckpoints):
    """Fully sharded data parallelism over all processes.

    Args:
        shard_size: Processes that share one copy of the weights; the others hold further copies and gradients are
            averaged over all. None is all processes. The GPUs of a machine keep every gather inside it; 1 divides nothing.
        param_dtype: Dtype of gathered weights and of computation; None keeps the weights' own. With "bfloat16" and
            ``trainer.precision: 32-true``, weights that train stay in float32 and are gathered in half the bytes.
        reduce_dtype: Dtype gradients are averaged in.
        save_distributed_checkpoint: Every process writes its shard into a folder. False writes one ordinary file,
            which other strategies can resume from, at the price of gathering everything on the first process.
        process_group_backend: None is NCCL on GPUs and gloo on the CPU.
        timeout: Of collectives.
    """

    def __init__(
        self,
        shard_size: int | None = None,
        param_dtype: Literal["bfloat16", "float32"] | None = None,
        reduce_dtype: Literal["bfloat16", "float32"] | None = "float32",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.shard_size, self.param_dtype, self.reduce_dtype = shard_size, param_dtype, reduce_dtype

    def shard(self, policy: nn.Module) -> None:
        """`shard` over this strategy's processes and in its precision. For ``configure_model``."""
        dtypes = {None: None, "bfloat16": torch.bfloat16, "float32": torch.float32}
        precision = MixedPrecisionPolicy(param_dtype=dtypes[self.param_dtype], reduce_dtype=dtypes[self.reduce_dtype])
        shard(policy, self._mesh(), precision)

    def _mesh(self) -> DeviceMesh:
        """Neighbouring ranks, those of one machine first, share a copy."""
        if self.shard_size in (None, self.world_size):
            return self.device_mesh["data_parallel"]
        copies = self.world_size // self.shard_size
        shape, names = (copies, self.shard_size), ("replicate", "shard")
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def setup_environment(self) -> None:
        """Make every process data-parallel; Lightning's default would make every node so.

        Raises:
            ValueError: The processes do not divide into groups of ``shard_size``.
        """
        world = self._data_parallel_size = self.num_nodes * self.num_processes
        divisors = [size for size in range(1, world + 1) if world % size == 0]
        if self.shard_size not in (None, *divisors):
            allowed = ", ".join(map(str, divisors))
            raise ValueError(
                f"shard_size={self.shard_size} of strategy fsdp2 with {world} processes; allowed: {allowed}, or null for all"
            )
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Refuse inference mode, whose tensors FSDP would keep and the next training step could not update."""
        if trainer.validate_loop.inference_mode:
            raise ValueError(
                "strategy fsdp2 cannot train after trainer.inference_mode=true: set trainer.inference_mode: false"
            )
        super().setup(trainer)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, gradients accumulate without communication."""
        assert self.model is not None
        modules = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description=str(FSDP2Strategy.__doc__))
