"""Flow matching of any flow pipeline on images and their captions."""

from __future__ import annotations

from pathlib import Path

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
from uae.models.finetune import IMAGE_TRANSFORMER, Finetune, Full, LoRA
from uae.models.flow.network import FlowNetwork
from uae.models.pipelines.contracts import denoiser_of
from uae.seeds import seed_of
from uae.types import UMM, ImageBatch
from uae.weights.placement import working_device


class DecoderTuning(SystemObjective):
    """Velocity regression: predict ``noise - latent`` at ``x_t = (1 - t) latent + t noise``, with logit-normal times.

    Times and noise follow from the image's id and the step. Written at the end: ``denoiser/`` (PEFT adapter or diffusers
    folder) and, if some of it trains, ``conditioner.safetensors``.

    Args:
        decoder: What of the denoiser trains. The default is an adapter of rank 32 on its attention.
        trainable: Regular expression over the conditioner's parameter names: what of it trains, too. "" is nothing.
        mean, std: Of the logit of the time; larger means are noisier images.
        dropout: Share of images whose caption is replaced by the empty one (for guidance).
        gradient_checkpointing: Compute the insides of the denoiser's layers again in the backward pass.
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
        self.decoder = decoder or LoRA(rank=32, alpha=32, target_modules=IMAGE_TRANSFORMER)
        self.trainable, self.mean, self.std, self.dropout = trainable, mean, std, dropout
        self.gradient_checkpointing = gradient_checkpointing

    def attach(self, umm: UMM) -> None:
        """The denoiser's trainables, and the conditioner's."""
        renderer = check_pipeline(umm.renderer)
        placement = renderer.rendering.placement
        key = "model.init_args.system.init_args.rendering.placement"
        if placement.offload or placement.device is not None:
            raise ValueError(
                f"a denoiser that trains is where the run is: set {key}.offload to false and {key}.device to null"
            )
        if placement.dtype == "float8" or isinstance(self.decoder, Full) and placement.dtype != "float32":
            raise ValueError(
                f"{key}.dtype={placement.dtype} would round away the updates of {type(self.decoder).__name__}; allowed: float32 "
                "(with trainer.precision=bf16-mixed), or bfloat16 below an adapter (LoRA)"
            )
        learner = Learner(FlowNetwork(denoiser_of(renderer.pipe)))
        self.decoder.attach(learner, keep_reference=False)
        self.denoiser = learner.network.model  # an adapter goes into the pipeline's own layers
        self.renderer = renderer
        if self.trainable:
            self.conditioner = unfreeze(umm.conditioner, self.trainable, "DecoderTuning")
        if self.gradient_checkpointing:
            recompute(renderer)

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``loss``: mean squared error of the velocity, latent units."""
        return {"loss": self._error(batch, self.step)}

    def _error(self, batch: ImageBatch, step: int) -> Tensor:
        renderer = self.renderer
        seeds = [seed_of(self.seed, image, step, "flow") for image in batch["id"].tolist()]
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = torch.stack([torch.rand(1, generator=stream)[0] for stream in streams])
        texts = zip(captions_of(batch, self), draws.tolist(), strict=True)
        captions = ["" if draw < self.dropout else caption for caption, draw in texts]
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.trainable)):
            condition = self.condition(batch, captions)
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
        """``error`` of the velocity on held-out images, at the same times and noise every time."""
        return {"error": self._error(batch, step=-1).item()}

    def save(self, folder: Path) -> None:
        """Write ``denoiser/`` and ``conditioner.safetensors``."""
        save_network(folder / DENOISER, self.denoiser)
        if self.trainable:
            save_trained(folder, self.conditioner)
