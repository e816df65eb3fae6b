"""X-Omni's pixel decoder: FLUX.1-dev, whose image tokens get the features of an image's codes between its two stacks of blocks.

The decoder starts from noise, so codes alone do not determine an image. It also reads the caption, as FLUX does; the official code
gives it the caption that the codes were drawn from. It is frozen, and no gradient passes through it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uae.models.pipelines.contracts import text_encoders_of
from uae.models.pipelines.loading import fresh_scheduler, load_pipeline
from uae.weights.from_state import diffusion_model
from uae.weights.placement import Placement, at_work, settle, torch_dtype
from uae.weights.state import load_into, read_state

KEY = "model.init_args.system.init_args.decoding"
DISTILLED_GUIDANCE = 1.0  # what the official code gives FLUX's own input for guidance
SIDE = 16  # pixels of a code and of a token of FLUX


@dataclass(frozen=True)
class Decoding:
    """How codes become pixels.

    Args:
        steps: Number of denoising steps; None is the checkpoint's.
        guidance: Scale of guidance between the pass with caption and features and the one with neither, above 1; None is the
            checkpoint's.
        reads_caption: Whether the decoder reads the caption beside the codes, as in the official code. False gives it the empty
            text, so that everything a caption says passes through the codes.
        rows: Number of images that are decoded in one batch. It limits memory and does not change the images.
        placement: Device and dtype of the decoder, its text encoders included.
    """

    steps: int | None = None
    guidance: float | None = None
    reads_caption: bool = True
    rows: int = 4
    placement: Placement = Placement()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A number is out of its range.
        """
        for key in ("steps", "rows"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{KEY}.{key}={value}; allowed: 1 or more; change {KEY}.{key}")
        if self.guidance is not None and self.guidance <= 1:
            raise ValueError(
                f"{KEY}.guidance={self.guidance}; allowed: above 1, because the decoder was made for guidance, or null (the "
                f"checkpoint's); change {KEY}.guidance"
            )


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says of its decoder, in ``vision_config.decoder``.

    Args:
        folder: Subfolder of the transformer.
        steps: Number of denoising steps.
        guidance: Scale of guidance.
    """

    folder: str
    steps: int
    guidance: float


def settings_of(written: dict[str, Any], key: str) -> Settings:
    """The settings of a decoder as a checkpoint has them.

    Raises:
        ValueError: They are none that this decoder knows.
    """
    side, scales = written["upscale_factor"], (written["cfg_scale"], written["cfg_scale_2"])
    if side != SIDE or scales[0] != scales[1]:
        raise ValueError(
            f"vision_config.decoder has upscale_factor={side}, cfg_scale={scales[0]} and cfg_scale_2={scales[1]}; allowed: "
            f"upscale_factor={SIDE}, and one scale for both; change {key}"
        )
    return Settings(written["model_path"], written["num_inference_steps"], scales[0])


class PixelDecoder:
    """Features of codes to pixels. Row n depends on its features, its caption and its seed only.

    Args:
        pipe: A ``FluxPipeline`` with X-Omni's transformer.
        embed: X-Omni's linear map from features to the width of the transformer.
        settings: The checkpoint's settings.
        decoding: The run's settings.
    """

    def __init__(self, pipe: Any, embed: nn.Linear, settings: Settings, decoding: Decoding) -> None:
        self.pipe, self.embed, self.decoding = pipe, embed, decoding
        self.steps = settings.steps if decoding.steps is None else decoding.steps
        self.guidance = settings.guidance if decoding.guidance is None else decoding.guidance
        self.device: torch.device | str = "cpu"
        for module in self.modules():
            module.requires_grad_(False).eval()

    def modules(self) -> list[nn.Module]:
        """All networks: text encoders, transformer, map of features, autoencoder."""
        return [*(part for part in self.pipe.components.values() if isinstance(part, nn.Module)), self.embed]

    def to(self, device: torch.device | str) -> None:
        """Move the networks to the device that their placement names; images are returned on ``device``."""
        self.device = device
        settle(self.modules(), self.decoding.placement, device)

    @torch.no_grad()
    def decode(self, features_NPZ: Tensor, grid: tuple[int, int], texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Images ``[N, 3, H, W]``, float32 in [0, 1].

        Args:
            features_NPZ: Features of the codes of N images, row after row.
            grid: Rows and columns of codes.
            texts: The captions. They are not read if the settings say so.
            seeds: Seeds of the noise that decoding starts from.
        """
        readers, placement = list(text_encoders_of(self.pipe).values()), self.decoding.placement
        parts = _parts(len(texts), self.decoding.rows)
        with at_work(readers, placement, self.device) as work:
            read = [self._read(list(texts[part]), work) for part in parts]
        with at_work([part for part in self.modules() if part not in readers], placement, self.device) as work:
            images = [
                self._decode(features_NPZ[part].to(work), grid, some, list(seeds[part]))
                for part, some in zip(parts, read, strict=True)
            ]
        return torch.cat(images).float().to(self.device)

    def _read(self, texts: list[str], work: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Token embeddings and pooled vectors of N captions, then N times those of the empty text; positions of the tokens."""
        said = texts if self.decoding.reads_caption else [""] * len(texts)
        embeds_NLD, pooled_NP, positions = self.pipe.encode_prompt(
            prompt=[*said, ""], prompt_2=None, device=work, max_sequence_length=512
        )
        rows = [*range(len(texts)), *[len(texts)] * len(texts)]
        return embeds_NLD[rows], pooled_NP[rows], positions

    def _decode(self, features_NPZ: Tensor, grid: tuple[int, int], read: tuple[Tensor, Tensor, Tensor], seeds: list[int]) -> Tensor:
        pipe, rows = self.pipe, len(seeds)
        height, width = (side * SIDE for side in grid)
        dtype, work = pipe.transformer.dtype, features_NPZ.device
        embeds_MLD, pooled_MP, text_ids = (x.to(work) for x in read)
        given_NPD = self.embed(features_NPZ.to(self.embed.weight.dtype))
        added = self._between_stacks(torch.cat([given_NPD, torch.zeros_like(given_NPD)]))
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        channels = pipe.transformer.config.in_channels // 4
        latents_NPC, image_ids = pipe.prepare_latents(rows, channels, height, width, dtype, work, noise)
        with ExitStack() as stack:
            stack.enter_context(fresh_scheduler(pipe))
            for time in self._times(latents_NPC.shape[1], work):
                both = pipe.transformer(
                    hidden_states=latents_NPC.repeat(2, 1, 1),
                    timestep=time.expand(2 * rows).to(dtype) / 1000,
                    guidance=self._distilled(2 * rows, work),
                    pooled_projections=pooled_MP,
                    encoder_hidden_states=embeds_MLD,
                    txt_ids=text_ids,
                    img_ids=image_ids,
                    controlnet_block_samples=added,
                    return_dict=False,
                )[0]
                c_NPC, u_NPC = both.chunk(2)
                velocity_NPC = u_NPC + self.guidance * (c_NPC - u_NPC)
                latents_NPC = pipe.scheduler.step(velocity_NPC, time, latents_NPC, return_dict=False)[0]
        return self._pixels(latents_NPC, height, width)

    def _between_stacks(self, embeds_MPD: Tensor) -> list[Tensor]:
        """What FLUX adds to its image tokens behind each block of its first stack: nothing, and the features behind the last."""
        blocks = len(self.pipe.transformer.transformer_blocks)
        return [*[embeds_MPD.new_zeros(())] * (blocks - 1), embeds_MPD]

    def _distilled(self, rows: int, work: torch.device) -> Tensor | None:
        takes = self.pipe.transformer.config.guidance_embeds
        return torch.full([rows], DISTILLED_GUIDANCE, device=work) if takes else None

    def _times(self, tokens: int, work: torch.device) -> Iterator[Tensor]:
        """The times of the denoising steps, shifted by the number of tokens as FLUX does."""
        import numpy as np
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        config = self.pipe.scheduler.config
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        shift = calculate_shift(tokens, *(config.get(name, usual) for name, usual in names.items()))
        sigmas = np.linspace(1.0, 1 / self.steps, self.steps).tolist()
        times, _ = retrieve_timesteps(self.pipe.scheduler, self.steps, work, sigmas=sigmas, mu=shift)
        self.pipe.scheduler.set_begin_index(0)
        yield from times

    def _pixels(self, latents_NPC: Tensor, height: int, width: int) -> Tensor:
        vae = self.pipe.vae
        latents_NCHW = self.pipe._unpack_latents(latents_NPC, height, width, self.pipe.vae_scale_factor)
        latents_NCHW = latents_NCHW / vae.config.scaling_factor + vae.config.shift_factor
        images_N3HW: Tensor = vae.decode(latents_NCHW.to(vae.dtype), return_dict=False)[0]
        return (images_N3HW.float() / 2 + 0.5).clamp(0, 1)


def load_decoder(folder: Path, written: dict[str, Any], flux: str, decoding: Decoding, key: str) -> PixelDecoder:
    """The decoder of a checkpoint, on the CPU.

    Args:
        folder: Folder of the checkpoint.
        written: ``vision_config.decoder`` of its ``config.json``.
        flux: Folder or hub id of FLUX.1-dev, which supplies everything but the transformer.
        decoding: The run's settings.
        key: The setting that holds the name of the folder, for error messages.

    Raises:
        FileNotFoundError, ValueError: A file is missing, or does not hold the weights; or an 8-bit dtype is asked for.
    """
    import diffusers

    if decoding.placement.dtype == "float8":
        raise ValueError(f"{KEY}.placement.dtype='float8'; allowed: bfloat16, float16, float32; change {KEY}.placement.dtype")
    settings, dtype = settings_of(written, key), torch_dtype(decoding.placement)
    place = folder / settings.folder
    source, state = str(place), read_state(place)
    state, mapped = dict(state), state.get("siglip_embed.weight")
    embed_state = {} if mapped is None else {"weight": state.pop("siglip_embed.weight")}
    config = transformer_config(json.loads((place / "config.json").read_text()))
    kind = diffusers.FluxTransformer2DModel
    transformer = diffusion_model(kind, config, state, dtype, source, key)
    with torch.device("meta"):
        width, inner = (1, 1) if mapped is None else mapped.shape
        embed = nn.Linear(inner, width, bias=False).to(dtype)
    load_into(embed, embed_state, f"{source}: siglip_embed", key)
    pipe = load_pipeline(flux, decoding.placement, "model.init_args.system.init_args.flux", transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return PixelDecoder(pipe, embed, settings, decoding)


def transformer_config(written: dict[str, Any]) -> dict[str, Any]:
    """The settings of FLUX's transformer alone, from those of X-Omni's."""
    own = ("siglip_channels", "drop_token_prob")
    return {name: value for name, value in written.items() if name not in own and not name.startswith("_")}


def _parts(rows: int, most: int) -> list[slice]:
    return [slice(start, start + most) for start in range(0, rows, most)]
