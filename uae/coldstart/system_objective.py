"""The base class of objectives that train parts of a system, and the functions these objectives share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uae.coldstart.objective import Objective
from uae.learner import Network
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.engine import unwrapped
from uae.models.captioners.policy import VLMContext
from uae.models.finetune import Finetune
from uae.models.pipelines.contracts import denoiser_of
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.rewards import WeightedReward
from uae.types import UMM, Condition, Conditioner, ImageBatch, Rollout, System

CAPTIONER, DENOISER, CONDITIONER = "captioner", "denoiser", "conditioner"  # files and folders that `save` writes


class SystemObjective(Objective):
    """Trains parts of any `uae.types.System` on images and their captions.

    Modules that train are registered as submodules. The whole model is kept in the tuple ``frozen``, where Lightning does
    not find it; all its other weights are frozen, and its modules are in eval mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.system: System | None = None  # `use` sets these
        self.finetune: Finetune | None = None
        self.reward: WeightedReward | None = None
        self.instruction: str | None = None
        self.seed = 0

    def use(
        self,
        system: System | None,
        finetune: Finetune | None = None,
        reward: WeightedReward | None = None,
        instruction: str | None = None,
        seed: int = 0,
    ) -> None:
        """Take over the arguments of `uae.coldstart.ColdStart`, which explains them. Nothing is loaded yet.

        Raises:
            ValueError: ``system`` is None.
        """
        if system is None:
            raise ValueError(f"model.init_args.system=null, but {type(self).__name__} trains a system; set model.init_args.system")
        self.system, self.finetune, self.reward = system, finetune, reward
        self.instruction, self.seed = instruction, seed

    def build(self) -> None:
        """Build the system on the CPU, freeze all its weights, and unfreeze those that train."""
        assert self.system is not None
        umm = self.system.build()
        for part in (umm.captioner.learner.network, umm.conditioner):
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        with torch.random.fork_rng(devices=[]):  # every rank starts from the same adapter
            torch.manual_seed(self.seed)
            self.attach(umm)
        self.frozen: tuple[UMM, ...] = (umm,)

    def attach(self, umm: UMM) -> None:
        """Unfreeze the weights that train and register their modules.

        Raises:
            ValueError: This objective cannot train such a system.
        """
        raise NotImplementedError

    def place(self, device: torch.device) -> None:
        """Move the frozen parts, which Lightning does not know, to a device."""
        (umm,) = self.frozen
        umm.captioner.to(device)
        umm.conditioner.to(device)
        umm.renderer.to(device)

    def rollout(self, batch: ImageBatch, max_tokens: int) -> Rollout[VLMContext]:
        """The captions of the data set as a rollout, as if the captioner had written them."""
        (umm,) = self.frozen
        captioner = hf_captioner(umm, type(self).__name__)
        context = captioner.prepare(batch["image"], self.instruction)
        return caption_rollout(captioner, captions_of(batch, self), context, max_tokens)

    def condition(self, batch: ImageBatch, captions: list[str]) -> Condition:
        """Encode captions as the renderer's condition. The rollout is passed on for conditioners that read the image too."""
        (umm,) = self.frozen
        tokenized = isinstance(unwrapped(umm.captioner), HFCaptioner)  # other captioners have no tokens
        rollout = self.rollout({**batch, "caption": captions}, max_tokens=2**30) if tokenized else None
        return umm.conditioner.encode(captions, rollout)


def hf_captioner(umm: UMM, who: str) -> HFCaptioner:
    """The captioner of a system, if it is a Hugging Face model in this process.

    Args:
        umm: The system.
        who: Name of the objective, for the error message.

    Raises:
        ValueError: The captioner is of another kind, and has no weights here.
    """
    captioner = unwrapped(umm.captioner)
    if not isinstance(captioner, HFCaptioner):
        kind = type(captioner).__name__
        raise ValueError(f"{who} needs the weights of the captioner, but {kind} has none here; change model.init_args.system")
    return captioner


def diffusers_renderer(umm: UMM, who: str) -> DiffusersRenderer:
    """The renderer of a system, if it is a diffusers pipeline.

    Args:
        umm: The system.
        who: Name of the objective, for the error message.

    Raises:
        ValueError: The renderer is of another kind.
    """
    if not isinstance(umm.renderer, DiffusersRenderer):
        kind = type(umm.renderer).__name__
        raise ValueError(f"{who} needs a diffusers pipeline, but the renderer is {kind}; change model.init_args.system")
    return umm.renderer


def captions_of(batch: ImageBatch, objective: nn.Module) -> list[str]:
    """The captions of a batch.

    Raises:
        ValueError: The batch has no captions.
    """
    if "caption" not in batch:
        names = ", ".join(batch.get("name", [])[:3])
        raise ValueError(
            f"{type(objective).__name__} learns from captions, but images of a batch ({names}) have none: change data.class_path to "
            "a data module that leaves out images without a caption where the model needs_captions, or give them captions"
        )
    return batch["caption"]


def caption_rollout(captioner: HFCaptioner, captions: list[str], context: VLMContext, max_tokens: int) -> Rollout[VLMContext]:
    """Captions as a rollout with one caption per image: tokens ``[B, T]``, padded on the right.

    A caption ends with the end-of-sequence token unless it is cut at ``max_tokens``. Tokens that the policy never samples
    (placeholders of images, ends of turns) are removed, because their log-probs would be -inf.
    """
    tokenizer = captioner.processor.tokenizer
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in captioner.end_ids else captioner.end_ids[0]
    never = {*captioner.learner.network.banned_ids.tolist(), *captioner.end_ids}
    rows = []
    for ids in tokenizer(captions, add_special_tokens=False)["input_ids"]:
        rows.append([*(i for i in ids if i not in never), end][:max_tokens])
    length = max(map(len, rows))
    tokens_BT = torch.tensor([row + [captioner.pad_id] * (length - len(row)) for row in rows])
    mask_BT = torch.tensor([[1.0] * len(row) + [0.0] * (length - len(row)) for row in rows])
    tokens_BT, mask_BT = tokens_BT.to(captioner.device), mask_BT.to(captioner.device)
    return Rollout(
        mask_RS=mask_BT,
        logp_RS=torch.zeros_like(mask_BT),
        tokens_NT=tokens_BT,
        texts=list(captions),
        context=context,
        group=1,
    )


def unfreeze(conditioner: Conditioner, pattern: str, who: str) -> nn.Module:
    """Make the conditioner's parameters whose names match trainable and float32, in place.

    Args:
        conditioner: The conditioner of a system.
        pattern: Regular expression that is searched in parameter names.
        who: Name of the objective, for the error message.

    Returns:
        The conditioner.

    Raises:
        ValueError: No parameter matches.
    """
    parameters = dict(conditioner.named_parameters()) if isinstance(conditioner, nn.Module) else {}
    names = [name for name in parameters if re.search(pattern, name)]
    if not names or not isinstance(conditioner, nn.Module):
        kind = type(conditioner).__name__
        has = f"none of its {len(parameters)} parameters matches {pattern!r}" if parameters else "it has no parameters"
        raise ValueError(
            f"{who} has nothing to train in {kind}: {has}; change model.init_args.objective.init_args.trainable, or set "
            "model.init_args.system to one whose captions go through a projector (uae, uniworld_v1, metaquery, tiny)"
        )
    for name in names:
        parameters[name].requires_grad_(True)
        parameters[name].data = parameters[name].data.float()
    return conditioner


def recompute(renderer: DiffusersRenderer) -> None:
    """Turn on the denoiser's own gradient checkpointing.

    Raises:
        ValueError: The denoiser has none.
    """
    denoiser = denoiser_of(renderer.pipe)
    if not getattr(denoiser, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"{type(denoiser).__name__} has no gradient checkpointing; set "
            "model.init_args.objective.init_args.gradient_checkpointing to false"
        )
    denoiser.enable_gradient_checkpointing()


def save_network(folder: Path, network: Any) -> None:
    """Write a network to a folder: its PEFT adapter if it has one, else all weights in the layout of its library."""
    if hasattr(network, "peft_config"):  # no embeddings are trained; without False, PEFT asks the hub
        network.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    else:
        network.save_pretrained(folder)


def save_captioner(folder: Path, network: Network, processor: Any) -> None:
    """Write ``captioner/``: the adapter, or the whole network with its processor."""
    save_network(folder / CAPTIONER, network.model)
    if not network.adapted:
        processor.save_pretrained(folder / CAPTIONER)


def save_trained(folder: Path, module: nn.Module) -> None:
    """Write the trainable parameters of a conditioner to ``conditioner.safetensors``, under their own names."""
    from uae.weights.state import save_state

    trained: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    save_state(folder, CONDITIONER, trained)
