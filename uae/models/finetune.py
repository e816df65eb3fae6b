"""Which weights of a network train: a low-rank adapter or the weights themselves. The configuration chooses one."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from uae.learner import FrozenAdapter, FrozenCopy, Learner, WithoutAdapter

LANGUAGE_MODEL = (  # attention, feed-forward, and the linear attention of hybrids; Emu3's is named text_model
    r".*\b(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|in_proj_\w+|out_proj)"
)
IMAGE_TRANSFORMER = (
    r".*attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"  # of diffusers; as Flow-GRPO adapts them
)
IMAGE_TOWER_ASIDE = r"^(?!.*(visual|vision_tower|vision_model)\.)"


class Finetune:
    """Decides which parameters of a network train, and how the initial weights (the reference) can be used again."""

    def attach(self, learner: Learner[Any], keep_reference: bool) -> None:
        """Freeze and unfreeze ``learner.network`` in place, and set ``learner.start``.

        Args:
            learner: The learner whose network has its initial weights.
            keep_reference: Whether ``learner.reference()`` will be called, as it is where a KL coefficient is above 0.
        """
        raise NotImplementedError


class LoRA(Finetune):
    """Trains a low-rank adapter on the language model or the denoiser.

    The reference is the model with the adapter turned off, so it takes no memory. The adapter's weights are float32 even if
    the model is bfloat16, because bfloat16 would round updates of 1e-6 away.

    Args:
        rank: Rank of the adapter.
        alpha: Scale of the adapter; it adds ``alpha / rank * B A`` to a weight.
        target_modules: Regular expression over the names of modules that get an adapter, or "all-linear" for every linear
            layer except the output head, those of the image tower included, as UAE was trained. The default is the linear
            layers of the language model, or the attention of a diffusers denoiser.
        adapter: Folder of a PEFT adapter to start from; the reference is then a frozen copy of that adapter.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: int = 32,
        target_modules: str = f"{LANGUAGE_MODEL}|{IMAGE_TRANSFORMER}",
        adapter: str | None = None,
    ) -> None:
        self.rank, self.alpha, self.target_modules, self.adapter = rank, alpha, target_modules, adapter

    def attach(self, learner: Learner[Any], keep_reference: bool) -> None:
        """Wrap the model in a PeftModel. Dropout is 0, because with dropout the policy ratio would not start at one."""
        import peft

        network = learner.network
        model = network.model.requires_grad_(False)
        if self.adapter is None:
            aside = network.never_adapted()
            config = peft.LoraConfig(
                r=self.rank, lora_alpha=self.alpha, target_modules=self.target_modules, lora_dropout=0.0,
                exclude_modules=[name for name, module in model.named_modules() if module in aside] or None,
            )  # fmt: skip
            network.model, learner.start = peft.get_peft_model(model, config), WithoutAdapter()
            return
        wrapped = peft.PeftModel.from_pretrained(model, self.adapter, is_trainable=True)
        if keep_reference:
            wrapped.load_adapter(self.adapter, adapter_name="reference", is_trainable=False)
            wrapped.set_adapter("default")
            learner.start = FrozenAdapter("reference")
        network.model = wrapped


class Full(Finetune):
    """Trains the weights themselves. The reference is a frozen copy, made only if a KL term needs it.

    Args:
        trainable: Regular expression that is searched in parameter names; parameters without a match stay frozen. The
            default freezes the image tower.
    """

    def __init__(self, trainable: str = IMAGE_TOWER_ASIDE) -> None:
        self.trainable = trainable

    def attach(self, learner: Learner[Any], keep_reference: bool) -> None:
        """Unfreeze the parameters that match, and copy the initial weights if a reference is asked for.

        Raises:
            ValueError: No parameter matches.
        """
        network = learner.network
        if keep_reference:
            learner.start = FrozenCopy(copy.deepcopy(network).requires_grad_(False).eval())
        names = [name for name, _ in network.model.named_parameters() if re.search(self.trainable, name)]
        if not names:
            raise ValueError(
                f"model.init_args.finetune.init_args.trainable={self.trainable!r} matches no parameter of the network; allowed: "
                "a regular expression that is found in the name of one"
            )
        for name, parameter in network.model.named_parameters():
            parameter.requires_grad_(name in names)


def check_resolution(networks: Mapping[str, nn.Module | None]) -> None:
    """Check that no weight trains in 16 bits, which would round small updates away.

    Args:
        networks: What trains, by the key below ``model.init_args.system.init_args`` that sets its dtype.

    Raises:
        ValueError: A weight does.
    """
    for key, network in networks.items():
        for name, parameter in network.named_parameters() if network is not None else ():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise ValueError(
                    f"model.init_args.system.init_args.{key}={dtype}, but these weights train ({name}), and {dtype} rounds updates of "
                    f"1e-5 away; allowed: model.init_args.system.init_args.{key}=float32 with trainer.precision=bf16-mixed, or an "
                    "adapter (uae.models.finetune.LoRA)"
                )
