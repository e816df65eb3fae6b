"""Fully sharded training (FSDP2) as a Lightning strategy, ``trainer.strategy: fsdp2``.

It adds the following to Lightning's `ModelParallelStrategy`. Every process is data-parallel. Groups of `shard_size` processes
may each hold a copy of the weights. Gradients are reduced once per accumulation window. Checkpoints hold only the weights that
train. A rollout gathers every weight once (`unsharded`). It works with NCCL and, for tests, with gloo on a CPU.
docs/scaling.md lists its memory and communication.
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
        policy: The network to shard. Afterwards its weights may be used in its ``forward`` or inside `unsharded` only.
        mesh: Device mesh. Weights are divided over its only dimension, or over the second of two; the first of two holds
            copies of the weights.
        precision: Dtypes of computation and of gradient reduction. With a ``param_dtype``, weights that train are kept in
            float32.
    """
    precision = precision or MixedPrecisionPolicy()
    if precision.param_dtype is not None:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    for block in blocks(policy):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    frozen = not any(parameter.requires_grad for parameter in policy.parameters())
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=frozen)  # frozen: no backward pass


def blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists of a network, such as its text layers and vision blocks."""
    if isinstance(module, nn.ModuleList):
        return [block for block in module if next(block.parameters(), None) is not None]
    return [block for child in module.children() for block in blocks(child)]


@contextmanager
def unsharded(root: nn.Module | None) -> Iterator[None]:
    """Inside, every rank holds the whole weights of a sharded module; they are gathered once, on entry.

    A module that is not sharded, or None, is left alone. All ranks must enter. Inside, there is no communication, so ranks may
    run different numbers of forward passes. Do not use it between a backward pass and its optimizer step.
    """
    if not isinstance(root, FSDPModule):
        yield
        return
    root._get_fsdp_state()._lazy_init()  # else the first block that runs is taken for the root
    modules = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()  # the root too, or it would keep its old weights after the optimizer step
            module.set_reshard_after_forward(module is not root, recurse=False)


def refuse_other_sharding(strategy: Any) -> None:
    """Refuse the sharding strategies of Lightning, which support neither rollouts nor frozen parts.

    ``fsdp`` and ``deepspeed`` would flatten frozen decoders together with trained weights, and gather them at every
    sampled token. `ModelParallelStrategy` is tensor-parallel over all devices by default, so it would divide nothing.

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
        shard_size: Number of processes that share one copy of the weights. Each further group of so many processes holds
            another copy, and gradients are averaged over all. None is all processes. With the number of GPUs per machine,
            weights are never gathered across machines. 1 divides nothing.
        param_dtype: Dtype of gathered weights and of computation; None keeps the dtype of the weights. With "bfloat16" and
            ``trainer.precision: 32-true``, weights that train stay in float32 and are gathered in half the bytes.
        reduce_dtype: Dtype in which gradients are averaged; None keeps their own.
        save_distributed_checkpoint: True makes every process write its shard into a folder. False writes one ordinary
            file, from which other strategies can resume; the first process then gathers all weights.
        process_group_backend: Backend of torch.distributed; None is NCCL on GPUs and gloo on the CPU.
        timeout: Time after which a collective operation fails.
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
        """Call `shard` with the processes and the precision of this strategy. To be used in ``configure_model``."""
        dtypes = {None: None, "bfloat16": torch.bfloat16, "float32": torch.float32}
        precision = MixedPrecisionPolicy(param_dtype=dtypes[self.param_dtype], reduce_dtype=dtypes[self.reduce_dtype])
        shard(policy, self._mesh(), precision)

    def _mesh(self) -> DeviceMesh:
        """The device mesh, in which neighbouring ranks, so those of one machine first, share a copy of the weights."""
        if self.shard_size in (None, self.world_size):
            return self.device_mesh["data_parallel"]
        copies = self.world_size // self.shard_size
        shape, names = (copies, self.shard_size), ("replicate", "shard")
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def setup_environment(self) -> None:
        """Make every process data-parallel. By default, Lightning would be data-parallel over machines only.

        Raises:
            ValueError: The processes do not divide into groups of ``shard_size``.
        """
        world = self._data_parallel_size = self.num_nodes * self.num_processes
        divisors = [size for size in range(1, world + 1) if world % size == 0]
        if self.shard_size not in (None, *divisors):
            allowed = ", ".join(map(str, divisors))
            raise ValueError(
                f"trainer.strategy.init_args.shard_size={self.shard_size} with {world} processes; allowed: {allowed}, or null for "
                "all; change trainer.strategy.init_args.shard_size"
            )
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Refuse inference mode: FSDP would keep tensors made in it, which the next training step cannot update.

        Raises:
            ValueError: ``trainer.inference_mode`` is true in a fit.
        """
        if trainer.validate_loop.inference_mode:
            raise ValueError(
                "trainer.inference_mode=true, but strategy fsdp2 cannot train after it; set trainer.inference_mode to false"
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
