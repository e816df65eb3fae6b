"""X-Omni as UMM-2: one language model reads images as tokens and draws them token by token; FLUX turns tokens into pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from uae.models.captioners.loading import Reading
from uae.models.tokens.policy import LogProb, TokenSampling
from uae.models.tokens.x_omni_decoder import Decoding
from uae.systems.blueprints import Blueprint
from uae.systems.instructions import IN_DETAIL
from uae.types import UMM

ARGUMENTS = "model.init_args.system.init_args"
KEY = f"{ARGUMENTS}.checkpoint"
SIDE = 16  # pixels of an image token


class XOmni:
    """A `uae.types.System` of one X-Omni checkpoint in the official layout. No code in it is run.

    Args:
        checkpoint: Folder or hub id: X-Omni/X-Omni-En, -SFT, -PT, or what a run exported. The decoder of X-Omni/X-Omni-Zh is
            another one and is not known here.
        vision: Folder or hub id of the checkpoint that has the image tokenizer and the pixel decoder; None is ``checkpoint``. An
            export of a run does not have them.
        flux: Folder or hub id of FLUX.1-dev, which supplies the decoder's autoencoder, text encoders and scheduler.
        height: Height of drawn images in pixels, a multiple of 16.
        width: Width of drawn images in pixels, a multiple of 16. One image token covers 16 x 16 pixels.
        guidance: Classifier-free guidance scale of image tokens, 1 or more; part of the policy. 1, the official value, is none
            and halves the work.
        image_temperature: Sampling temperature of image tokens, 0 or more; part of the policy. 0 is greedy.
        cfg_logprob: Which log-probs the policy reports under guidance, see `uae.models.tokens.policy.TokenSampling`.
        template: Prompt from which an image is drawn; contains "{caption}" exactly once.
        rows: Number of images whose tokens are drawn in one batch. It bounds memory and changes nothing else.
        decoding: How tokens become pixels.
        reading: Settings with which the language model is loaded and prompted.
    """

    def __init__(
        self,
        checkpoint: str = "X-Omni/X-Omni-En",
        vision: str | None = None,
        flux: str = "black-forest-labs/FLUX.1-dev",
        height: int = 512,
        width: int = 512,
        guidance: float = 1.0,
        image_temperature: float = 1.0,
        cfg_logprob: LogProb = "guided",
        template: str = "{caption}",
        rows: int = 8,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
        reading: Reading = Reading(),  # noqa: B008 (frozen)
    ) -> None:
        self.sampling = TokenSampling(guidance, image_temperature, cfg_logprob)
        self.checkpoint, self.vision, self.flux = checkpoint, vision or checkpoint, flux
        self.height, self.width, self.template = height, width, template
        self.rows, self.decoding, self.reading = rows, decoding, reading

    def blueprint(self) -> Blueprint:
        """The networks of the system without their weights, for memory plans. Images are read at the size they are drawn at."""
        from uae.models.renderers.rendering import Rendering
        from uae.models.tokens.x_omni_decoder import settings_of
        from uae.systems.blueprints import TokenDrawing
        from uae.weights.placement import Placement

        check_layout(self.checkpoint)
        (H, W), policy = self._grid(), language_model_skeleton(self.checkpoint, self.reading.dtype)
        config, vision = policy.config, vision_of(self.vision)
        decoder, place = settings_of(vision["decoder"], KEY), self.decoding.placement
        parts = {name: (part, place) for name, part in decoder_skeletons(self.vision, decoder.folder, self.flux).items()}
        parts["image tokenizer"] = tokenizer_skeleton(self.vision, vision["encoder"]), Placement(vision["dtype"])
        read = max(H * W, (vision["transform"].get("short_size", 384) // SIDE) ** 2)
        steps, guidance = self.decoding.steps or decoder.steps, self.decoding.guidance or decoder.guidance
        return Blueprint(
            policy,
            parts,
            Rendering(self.height, self.width, steps, guidance, rows=self.decoding.rows, placement=place),
            prompt_tokens=read + 128,
            reading=self.reading,
            drawing=TokenDrawing(H * W, H * W, config.image_vocab_size, self.height * self.width, self.sampling, self.rows),
        )

    def build(self) -> UMM:
        """Load the checkpoint on the CPU. It plays all three roles: captioner, conditioner and renderer."""
        from uae.files.locations import local_folder
        from uae.models.tokens import x_omni
        from uae.models.tokens.x_omni_decoder import load_decoder
        from uae.models.tokens.x_omni_image_tokenizer import load_image_tokenizer

        check_layout(self.checkpoint)
        check_reading(self.reading)
        grid, reading = self._grid(), self.reading
        model, processor = load_language_model(self.checkpoint, reading)
        place, key = local_folder(self.vision, KEY), f"{ARGUMENTS}.vision"
        settings = vision_of(str(place))  # of the files themselves, not of what ships with this package
        vision = load_image_tokenizer(place, settings["encoder"], getattr(torch, settings["dtype"]), key)
        decoder = load_decoder(place, settings["decoder"], self.flux, self.decoding, key)
        captioner = x_omni.XOmniCaptioner(
            model,
            processor,
            vision,
            resizing_of(settings["transform"]),
            IN_DETAIL if reading.instruction is None else reading.instruction,
            grid,
            image_first=reading.image_first is not False,
        )
        policy = captioner.learner.network
        policy.gradient_checkpointing, policy.compile_steps = reading.gradient_checkpointing, reading.compile
        conditioner = x_omni.XOmniConditioner(processor, grid, captioner.pad_id, self.template)
        renderer = x_omni.XOmniImagePolicy(captioner.learner, vision, decoder, self.sampling, self.rows)
        return UMM(captioner, conditioner, renderer)

    def _grid(self) -> tuple[int, int]:
        from uae.models.tokens.emu3 import grid

        return grid((self.height, self.width), SIDE)


def vision_of(checkpoint: str) -> dict[str, Any]:
    """``vision_config`` of a checkpoint: dtype, transform, encoder, decoder.

    Raises:
        ValueError: The checkpoint has none.
    """
    from uae.systems.blueprints import config_of

    vision: dict[str, Any] | None = config_of(checkpoint).get("vision_config")
    absent = sorted({"dtype", "transform", "encoder", "decoder"} - (vision or {}).keys())
    if vision is None or absent:
        raise ValueError(
            f"vision_config in config.json of {checkpoint!r} lacks {', '.join(absent)}; set {ARGUMENTS}.vision to a complete "
            "checkpoint"
        )
    return vision


def resizing_of(written: dict[str, Any]) -> Any:
    """How a checkpoint scales images before it reads them.

    Raises:
        ValueError: It has settings that are not known here.
    """
    from dataclasses import fields

    from uae.models.tokens.x_omni_image_tokenizer import Resizing

    known = {field.name for field in fields(Resizing)}
    if (unknown := sorted(written.keys() - known)) or written.get("random_ratio") is not None or written.get("patch_size", 16) != SIDE:
        raise ValueError(
            f"vision_config.transform has {unknown or {key: written.get(key) for key in ('patch_size', 'random_ratio')}}; allowed: "
            f"{', '.join(sorted(known))}, with patch_size {SIDE} and no random_ratio; change {ARGUMENTS}.vision"
        )
    return Resizing(**written)


def load_language_model(checkpoint: str, reading: Reading) -> tuple[Any, Any]:
    """The language model of a checkpoint on the CPU, and its tokenizer.

    Raises:
        ValueError: The checkpoint cannot be read, or lacks weights.
    """
    import transformers
    from safetensors import SafetensorError

    from uae.files.locations import locate
    from uae.models.captioners.steps import check_steps
    from uae.models.tokens.x_omni import XOmniProcessor
    from uae.models.tokens.x_omni_language_model import XOmniForCausalLM

    path = locate(checkpoint)
    settings: dict[str, Any] = {"local_files_only": Path(path).is_dir()}
    library: Any = XOmniForCausalLM
    try:
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(path, **settings)
        model, report = library.from_pretrained(
            path,
            dtype=getattr(torch, reading.dtype),
            attn_implementation=reading.attention,
            ignore_mismatched_sizes=True,  # the names are reported below
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(f"X-Omni {checkpoint!r} cannot be read ({' '.join(str(error).split())[:200]}); correct {KEY}") from error
    absent = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    if absent:
        raise ValueError(f"X-Omni {checkpoint!r} lacks {len(absent)} weights ({absent[0]}, ...), or has other shapes; correct {KEY}")
    if reading.compile:
        check_steps(model)
    return model, XOmniProcessor(tokenizer, model.config.mm_special_tokens)


def check_layout(checkpoint: str) -> None:
    """Check that a checkpoint is X-Omni.

    Raises:
        ValueError: It is another model, or the Chinese X-Omni.
    """
    from uae.systems.blueprints import config_of

    if checkpoint == "X-Omni/X-Omni-Zh":
        raise ValueError(f"{checkpoint!r} has a pixel decoder that is not known here; allowed: X-Omni/X-Omni-En; change {KEY}")
    kind = config_of(checkpoint).get("model_type")
    if kind != "x-omni":
        raise ValueError(f"{checkpoint!r} is of model_type {kind!r}; allowed: x-omni, such as X-Omni/X-Omni-En; change {KEY}")


def check_reading(reading: Reading) -> None:
    """Refuse settings of reading that X-Omni has no use for.

    Raises:
        ValueError: There are some.
    """
    from uae.models.captioners.loading import without_engine

    without_engine(reading, "X-Omni")
    for name in ("min_pixels", "max_pixels", "trust_remote_code"):
        if getattr(reading, name) is not None:
            raise ValueError(
                f"{ARGUMENTS}.reading.{name}={getattr(reading, name)!r}, but X-Omni reads images at the sizes of its checkpoint, and "
                f"no code in the checkpoint is run; allowed: null; change {ARGUMENTS}.reading.{name}"
            )


def language_model_skeleton(checkpoint: str, dtype: str) -> Any:
    """The language model without its weights. It has no image tower, so nothing is left of ``vision_config``."""
    from uae.models.tokens.x_omni_language_model import XOmniConfig, XOmniForCausalLM
    from uae.systems.blueprints import config_of

    written = config_of(checkpoint)
    config = XOmniConfig.from_dict({name: written[name] for name in written.keys() - {"model_type", "vision_config"}})
    with torch.device("meta"):
        return XOmniForCausalLM._from_config(config, dtype=getattr(torch, dtype))


def tokenizer_skeleton(checkpoint: str, encoder: dict[str, Any]) -> nn.Module:
    """The image tokenizer without its weights: in the size of the checkpoint's files if they are here, else as released."""
    from uae.files.locations import locate
    from uae.models.tokens.x_omni_image_tokenizer import ImageTokenizer, Sizes, sizes_of
    from uae.weights.state import read_state

    folder = Path(locate(checkpoint))
    if folder.is_dir():
        files = (folder / encoder[name] for name in ("siglip_path", "projector_path"))
        sizes = sizes_of(*(read_state(file) for file in files))  # files are mapped: shapes are read, and weights are not
    else:
        sizes = Sizes(codes=encoder.get("codebook_size", 16384), code_width=encoder.get("codebook_dim", 2048))
    with torch.device("meta"):
        return ImageTokenizer(sizes)


def decoder_skeletons(checkpoint: str, folder: str, flux: str) -> dict[str, nn.Module]:
    """The networks of the pixel decoder without their weights."""
    import diffusers

    from uae.models.tokens.x_omni_decoder import transformer_config
    from uae.systems.blueprints import config_of, pipeline_skeletons

    parts = pipeline_skeletons(flux, leave_out=("transformer",))
    written = config_of(checkpoint, folder)
    with torch.device("meta"):
        parts["transformer"] = diffusers.FluxTransformer2DModel.from_config(transformer_config(written))
        nn.Module.to(parts["transformer"], torch.bfloat16)
        width = parts["transformer"].inner_dim
        parts["map of features"] = nn.Linear(vision_of(checkpoint)["encoder"].get("z_channels", 1536), width, bias=False)
    return parts
