"""What trains: a low-rank adapter or the weights themselves. Swapped by configuration, nothing else changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

LANGUAGE_MODEL = (  # attention, feed-forward, and the linear attention of hybrids; Emu3's is named text_model
    r".*\b(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|in_proj_\w+|out_proj)"
)
IMAGE_TRANSFORMER = (
    r".*attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"  # of diffusers; as Flow-GRPO adapts them
)
IMAGE_TOWER_ASIDE = r"^(?!.*(visual|vision_tower|vision_model)\.)"


class Finetune:
    """Decides which parameters of a captioner train and where its reference comes from."""

    def attach(self, captioner: Any, keep_reference: bool) -> None:
        """Freeze and unfreeze ``captioner.policy`` in place.

        Args:
            captioner: An `uae.models.captioners.captioner.HFCaptioner` (or anything with ``policy``, ``reference_policy`` and
                ``starting_adapter``).
            keep_reference: Whether ``captioner.reference()`` will be needed (a KL coefficient above 0).
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

    def attach(self, captioner: Any, keep_reference: bool) -> None:
        """Wrap the model in a PeftModel. Dropout is 0: with it the policy ratio would not be one."""
        import peft

        model = captioner.policy.model.requires_grad_(False)
        if self.adapter is None:
            head = getattr(captioner.policy, "image_head", None)  # its weight is read, past any adapter
            config = peft.LoraConfig(
                r=self.rank, lora_alpha=self.alpha, target_modules=self.target_modules, lora_dropout=0.0,
                exclude_modules=[name for name, module in model.named_modules() if module is head] or None,
            )  # fmt: skip
            captioner.policy.model = peft.get_peft_model(model, config)
            captioner.starting_adapter = ""
            return
        wrapped = peft.PeftModel.from_pretrained(model, self.adapter, is_trainable=True)
        if keep_reference:
            wrapped.load_adapter(self.adapter, adapter_name="reference", is_trainable=False)
            wrapped.set_adapter("default")
            captioner.starting_adapter = "reference"
        captioner.policy.model = wrapped


class Full(Finetune):
    """The weights themselves; the reference is a frozen copy, made only when a KL term needs it.

    Args:
        trainable: A regular expression over parameter names, searched; the rest stays frozen. The default leaves out
            the image tower.
    """

    def __init__(self, trainable: str = IMAGE_TOWER_ASIDE) -> None:
        self.trainable = trainable

    def attach(self, captioner: Any, keep_reference: bool) -> None:
        """Unfreeze what matches and keep a copy of the start if asked."""
        policy: nn.Module = captioner.policy
        if keep_reference:
            captioner.reference_policy = copy.deepcopy(policy).requires_grad_(False).eval()
        names = [name for name, _ in policy.model.named_parameters() if re.search(self.trainable, name)]
        if not names:
            raise ValueError(f"finetune.trainable={self.trainable!r} matches no parameter of the policy")
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_(name in names)


@contextmanager
def switched_to(adapter: str, model: Any) -> Iterator[None]:
    """Inside, a PeftModel works with another adapter than "default", or with none ("")."""
    trains = [parameter.requires_grad for parameter in model.parameters()]
    if adapter:
        model.set_adapter(adapter)
    try:
        with nullcontext() if adapter else model.disable_adapter():
            yield
    finally:
        if adapter:
            model.set_adapter("default")
        for parameter, trained in zip(model.parameters(), trains, strict=True):  # PEFT switches these as well
            parameter.requires_grad_(trained)
