"""What trains: a low-rank adapter or the weights themselves. Swapped by configuration, nothing else changes."""

from __future__ import annotations

import copy
import re
from typing import Any

from uae.learner import FrozenAdapter, FrozenCopy, Learner, WithoutAdapter

LANGUAGE_MODEL = (  # attention, feed-forward, and the linear attention of hybrids; Emu3's is named text_model
    r".*\b(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|in_proj_\w+|out_proj)"
)
IMAGE_TRANSFORMER = (
    r".*attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"  # of diffusers; as Flow-GRPO adapts them
)
IMAGE_TOWER_ASIDE = r"^(?!.*(visual|vision_tower|vision_model)\.)"


class Finetune:
    """Decides which parameters of a network train, and how it gets back to where it started."""

    def attach(self, learner: Learner[Any], keep_reference: bool) -> None:
        """Freeze and unfreeze ``learner.network`` in place, and set ``learner.start``.

        Args:
            learner: The network, with the weights it starts from.
            keep_reference: Whether ``learner.reference()`` will be needed (a KL coefficient above 0).
        """
        raise NotImplementedError


class LoRA(Finetune):
    """A low-rank adapter on the language model or the denoiser; the reference is the model with the adapter off, so it costs nothing.

    Its weights are float32 also beside a bfloat16 model: updates of 1e-6 would be rounded away in bfloat16.

    Args:
        rank: Rank of the adapter.
        alpha: Scale; the update is ``alpha / rank * B A``.
        target_modules: A regular expression over module names, or "all-linear": every linear map but the output head,
            those of the image tower too, as UAE was trained. The default is the maps of the language model, or the
            attention of a denoiser of diffusers.
        adapter: Folder of a PEFT adapter to start from; the reference is then a frozen copy of it.
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
        """Wrap the model in a PeftModel. Dropout is 0: with it the policy ratio would not be one."""
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
    """The weights themselves; the reference is a frozen copy, made only when a KL term needs it.

    Args:
        trainable: A regular expression over parameter names, searched; the rest stays frozen. The default leaves out
            the image tower.
    """

    def __init__(self, trainable: str = IMAGE_TOWER_ASIDE) -> None:
        self.trainable = trainable

    def attach(self, learner: Learner[Any], keep_reference: bool) -> None:
        """Unfreeze what matches and keep a copy of the start if asked."""
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
