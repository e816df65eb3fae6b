"""Supervised training of a flow-matching renderer on images and their captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uae.coldstart.system_objective import (
    DENOISER,
    SystemObjective,
    captions_of,
    recompute,
    save_network,
    save_trained,
    unfreeze,
)
from uae.coldstart.velocity import check_pipeline, latents_of, velocity_of
from uae.learner import Learner
from uae.models.finetune import Finetune, Full, LoRA
from uae.models.flow.network import FlowNetwork
from uae.models.pipelines.contracts import denoiser_of
from uae.seeds import seed_of
from uae.types import UMM, ImageBatch
from uae.weights.placement import working_device


class DecoderTuning(SystemObjective):
    """Velocity regression: predict ``noise - latent`` at ``x_t = (1 - t) latent + t noise``, with logit-normal times.

    Times and noise are computed from the image's id and the step. At the end the objective writes ``denoiser/`` (a PEFT
    adapter or a diffusers folder) and, if a part of the conditioner trained, ``conditioner.safetensors``.

    Args:
        decoder: Which weights of the denoiser train. The default is an adapter of rank 32 on its attention layers.
        trainable: Regular expression; parameters of the conditioner whose names it matches train as well. With "" none do.
        mean: Mean of the normal distribution from which the logit of the time is drawn. A larger one gives noisier images.
        std: Standard deviation of that distribution.
        dropout: Share of images, from 0 to 1, whose caption is replaced by the empty string. Classifier-free guidance
            needs a denoiser that was trained so.
        gradient_checkpointing: Whether activations inside the denoiser's layers are recomputed in the backward pass
            instead of kept in memory.
    """

    def __init__(
        self,
        decoder: Finetune | None = None,
        trainable: str = "",
        mean: float = 0.0,
        std: float = 1.0,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"model.init_args.objective.init_args.dropout={dropout}; allowed: 0 to 1")
        self.decoder = decoder or LoRA(rank=32, alpha=32)
        self.decoder.key = "model.init_args.objective.init_args.decoder.init_args"
        self.trainable, self.mean, self.std, self.dropout = trainable, mean, std, dropout
        self.gradient_checkpointing = gradient_checkpointing

    def attach(self, umm: UMM) -> None:
        """Make weights of the denoiser trainable, and those of the conditioner that ``trainable`` matches.

        Raises:
            ValueError: The renderer is no flow-matching pipeline, or is offloaded, on another device, or in a dtype that
                cannot hold small updates.
        """
        renderer = check_pipeline(umm.renderer)
        placement = renderer.rendering.placement
        key = "model.init_args.system.init_args.rendering.placement"
        if placement.offload or placement.device is not None:
            raise ValueError(
                f"{key}.offload={placement.offload} and {key}.device={placement.device}, but DecoderTuning trains the denoiser "
                f"on the run's own device; set {key}.offload to false and {key}.device to null"
            )
        if placement.dtype == "float8" or isinstance(self.decoder, Full) and placement.dtype != "float32":
            raise ValueError(
                f"{key}.dtype={placement.dtype} would round away the updates of {type(self.decoder).__name__}; allowed: float32 "
                f"(with trainer.precision=bf16-mixed), or bfloat16 below an adapter (LoRA); change {key}.dtype"
            )
        learner = Learner(FlowNetwork(denoiser_of(renderer.pipe)))
        self.decoder.attach(learner, keep_reference=False)
        self.denoiser = learner.network.model  # the pipeline draws with it too: PEFT changes its layers in place
        self.renderer = renderer
        if self.trainable:
            self.conditioner = unfreeze(umm.conditioner, self.trainable, "DecoderTuning")
        if self.gradient_checkpointing:
            recompute(renderer)

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``loss``: mean squared error of the predicted velocity, in squared units of the latents."""
        return {"loss": self._error(batch, self.step)}

    def _error(self, batch: ImageBatch, step: int) -> Tensor:
        renderer = self.renderer
        seeds = [seed_of(self.seed, image, step, "flow") for image in batch["id"].tolist()]
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = torch.stack([torch.rand(1, generator=stream)[0] for stream in streams])
        texts = zip(captions_of(batch, self), draws.tolist(), strict=True)
        captions = ["" if draw < self.dropout else caption for caption, draw in texts]
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.trainable)):
            condition: Any = self.condition(batch, captions)
        work = working_device(renderer.rendering.placement, batch["image"].device)
        with torch.no_grad():
            latents = latents_of(renderer, batch["image"].to(work))
        times = torch.stack([torch.randn(1, generator=stream)[0] for stream in streams])
        times = torch.sigmoid(self.mean + self.std * times).to(work)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=stream) for stream in streams]).to(work)
        noised = torch.lerp(latents, noise, times.view(-1, *[1] * (latents.ndim - 1)))
        return (velocity_of(renderer, noised, times, condition) - (noise - latents)).square().mean()

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> dict[str, float]:
        """``error``: the loss on held-out images, with the same times and noise at every validation."""
        return {"error": self._error(batch, step=-1).item()}

    def save(self, folder: Path) -> None:
        """Write ``denoiser/`` below ``folder``, and ``conditioner.safetensors`` if the conditioner trained."""
        save_network(folder / DENOISER, self.denoiser)
        if self.trainable:
            save_trained(folder, self.conditioner)
