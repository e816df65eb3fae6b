"""The miniature: a unified multimodal model of real library classes that fits in a laptop's cache.

    captioner    Qwen2_5_VLForConditionalGeneration, 9 image tokens (one per cell of the scene)
    conditioner  Qwen2Model that reads the caption, MLP projector
    renderer     StableDiffusion3Pipeline: SD3Transformer2DModel, PatchAutoencoder, FlowMatchEulerDiscreteScheduler
    reward       an open_clip model
    judges       a DINOv2 model that no reward uses

The weights in ``tiny_weights/`` are in the official layout of each library and are loaded by its own loaders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from uae.encoders import HFEncoder, OpenCLIPEncoder
from uae.miniature.scenes import GRAMMAR, SIDE, WORDS, detect, word_of
from uae.rewards import BaseReward, CaptionFormat
from uae.rewards.base import batch_and_group
from uae.rewards.text import fidelity
from uae.types import UMM
from uae.weights.checksums import verify
from uae.weights.placement import dtype_argument

WEIGHTS = Path(__file__).parent / "tiny_weights"
INSTRUCTION = "describe"
PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO, UNKNOWN = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|unk|>",
)  # fmt: skip
SPECIALS = [PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO, UNKNOWN]
VOCABULARY = [*SPECIALS, "user", "assistant", INSTRUCTION, *WORDS]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|> <|image_pad|> <|vision_end|> ' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{{ '<|im_end|> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant' }}{% endif %}"
)


class Tiny:
    """The miniature as a `uae.types.System`.

    Args:
        weights: Folder of cold-started weights; the default ships with the package.
        steps: Denoising steps of the renderer.
        guidance: Classifier-free guidance; 1 means none.
    """

    def __init__(self, weights: str | None = None, steps: int = 4, guidance: float = 1.0) -> None:
        self.weights, self.steps, self.guidance = weights, steps, guidance

    def build(self) -> UMM:
        """Load captioner, conditioner and renderer."""
        from uae.models.captioners.captioner import HFCaptioner

        folder = Path(self.weights) if self.weights else WEIGHTS
        verify(folder)
        captioner = HFCaptioner(load_captioner(folder / "captioner"), load_processor(folder / "captioner"), INSTRUCTION)
        conditioner, renderer = load_decoder(folder / "decoder", self.steps, self.guidance)
        return UMM(captioner, conditioner, renderer)


class TinyCLIP(OpenCLIPEncoder):
    """The miniature's reward encoder: an open_clip model trained on scenes and their captions."""

    def __init__(self) -> None:
        super().__init__(f"local-dir:{WEIGHTS / 'clip'}", None)


class TinyJudge(HFEncoder):
    """The miniature's held-out encoder: a DINOv2 model with its own seed, data and objective; never a reward."""

    def __init__(self) -> None:
        super().__init__(str(WEIGHTS / "judge"), feature="cls")


class SceneFormat(CaptionFormat):
    """1 for a caption in the language of the scenes, else 0."""

    def __init__(self) -> None:
        super().__init__(GRAMMAR)


class WordFidelity(BaseReward):
    """What `uae.rewards.TextFidelity` is, read by the exact detector: a reader of the miniature that makes no mistakes.

    1 minus the edit distance between the words (`uae.miniature.scenes.word_of`) of source and reconstruction, relative to
    the longer one; in [0, 1].
    """

    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Rewards ``[B, G]``."""
        images, group = batch_and_group(sources_BCHW, reconstructions_NCHW, texts)
        words, redrawn = ([word_of(scene) for scene in detect(some)] for some in (sources_BCHW, reconstructions_NCHW))
        return torch.tensor([fidelity(words[n // group], word) for n, word in enumerate(redrawn)]).view(images, group)


def tokenizer(vocabulary: list[str] = VOCABULARY) -> Any:
    """One token per word."""
    specials = [START, VISION_START, VISION_END, IMAGE, VIDEO]
    return word_level(vocabulary, UNKNOWN, eos_token=END, pad_token=PAD, additional_special_tokens=specials)


def word_level(vocabulary: list[str], unknown: str, **marks: Any) -> Any:
    """A tokenizer with one token per word; ``marks`` are its special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    by_words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=unknown))
    by_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=by_words, unk_token=unknown, padding_side="left", **marks)


def processor(side: int = SIDE, vocabulary: list[str] = VOCABULARY) -> Any:
    """The Qwen2.5-VL processor for square images: 4-pixel patches, merged 2 x 2, so 9 image tokens for 24 pixels a side."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    sizes: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"shortest_edge": side * side, "longest_edge": side * side}
    image = Qwen2VLImageProcessor(**sizes, size=pixels, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    video = Qwen2VLVideoProcessor(**sizes)
    return Qwen2_5_VLProcessor(
        image_processor=image, tokenizer=tokenizer(vocabulary), video_processor=video, chat_template=CHAT_TEMPLATE
    )


def create_captioner(
    width: int = 128, layers: int = 4, vocabulary: list[str] = VOCABULARY, tower: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """A captioner with random weights. ``tower`` has settings of the image tower, by their names in transformers."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids, head = {word: i for i, word in enumerate(vocabulary)}, width // 4
    text = {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": len(vocabulary), "max_position_embeddings": 256, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [head // 4, head // 8, head // 8]},
        "bos_token_id": None, "eos_token_id": ids[END], "pad_token_id": ids[PAD],
    }  # fmt: skip
    vision = {
        "hidden_size": 96, "intermediate_size": 256, "depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "window_size": 64, "fullatt_block_indexes": [0, 1], "out_hidden_size": width, "hidden_act": "silu",
        **tower,
    }  # fmt: skip
    tokens: dict[str, Any] = {
        "image_token_id": ids[IMAGE], "video_token_id": ids[VIDEO],
        "vision_start_token_id": ids[VISION_START], "vision_end_token_id": ids[VISION_END],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ids[END], ids[PAD]
    return model


def load_captioner(folder: Path) -> Any:
    """The captioner, by transformers' own loader."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_processor(folder: Path) -> Any:
    """The processor, by transformers' own loader."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def create_decoder(width: int = 128, layers: int = 5, steps: int = 8, guidance: float = 1.0) -> tuple[Any, Any]:
    """Conditioner and renderer with random weights."""
    from diffusers import SD3Transformer2DModel
    from transformers import Qwen2Config, Qwen2Model

    from uae.miniature.patch_autoencoder import PatchAutoencoder
    from uae.models.conditioners.states import HiddenStateConditioner, mlp_projector

    reader = Qwen2Model(
        Qwen2Config(
            vocab_size=len(VOCABULARY),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
        )  # fmt: skip
    )
    embeddings: Any = reader.get_input_embeddings()
    embeddings.weight.data.normal_(0, 0.5)
    conditioner = HiddenStateConditioner(reader, tokenizer(), mlp_projector(width, 2 * width, width), template="{caption} " + END)
    vae: Any = PatchAutoencoder.create()
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8, patch_size=1, in_channels=vae.config.latent_channels, out_channels=vae.config.latent_channels,
        num_layers=layers, attention_head_dim=32, num_attention_heads=width // 32, joint_attention_dim=width,
        caption_projection_dim=width, pooled_projection_dim=width, pos_embed_max_size=SIDE // 8, qk_norm="rms_norm",
    )  # fmt: skip
    return conditioner, assemble_renderer(conditioner, transformer, vae, steps, guidance)


def assemble_renderer(conditioner: Any, transformer: Any, vae: Any, steps: int, guidance: float) -> Any:
    """A Stable Diffusion 3 pipeline without its text encoders, behind the renderer every system uses."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from uae.models.renderers.diffusers import DiffusersRenderer
    from uae.models.renderers.rendering import Rendering
    from uae.weights.placement import Placement

    absent = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    pipe: Any = StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **absent)
    pipe.vae_scale_factor = 8  # diffusers derives it from the number of blocks, which does not fit this autoencoder
    with torch.no_grad():
        negative = conditioner.encode([""]) if guidance > 1 else None
    return DiffusersRenderer(pipe, Rendering(SIDE, SIDE, steps, guidance, rows=64, placement=Placement("float32")), negative)


def load_decoder(folder: Path, steps: int, guidance: float) -> tuple[Any, Any]:
    """Conditioner and renderer, each part by its library's own loader."""
    from diffusers import SD3Transformer2DModel
    from safetensors.torch import load_file
    from transformers import PreTrainedTokenizerFast, Qwen2Model

    from uae.models.conditioners.states import HiddenStateConditioner, mlp_projector

    reader = Qwen2Model.from_pretrained(folder / "reader", local_files_only=True)
    weights = load_file(folder / "projector.safetensors")
    projector = mlp_projector(weights["0.weight"].shape[1], *weights["2.weight"].shape[::-1])
    projector.load_state_dict(weights)
    # AutoTokenizer would build Qwen2's byte-pair tokenizer, because the folder's config.json says Qwen2.
    reader_tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "reader", local_files_only=True)
    conditioner = HiddenStateConditioner(reader, reader_tokenizer, projector, template="{caption} " + END)
    conditioner.requires_grad_(False).eval()
    transformer = SD3Transformer2DModel.from_pretrained(
        str(folder / "transformer"), **dtype_argument(torch.float32), local_files_only=True
    )
    vae = load_autoencoder(folder / "vae")
    return conditioner, assemble_renderer(conditioner, transformer, vae, steps, guidance)


def load_autoencoder(folder: Path) -> Any:
    """The autoencoder, in float32 whatever it was written in."""
    from uae.miniature.patch_autoencoder import PatchAutoencoder

    return PatchAutoencoder.from_pretrained(folder, **dtype_argument(torch.float32), local_files_only=True)


def save_decoder(folder: Path, conditioner: Any, transformer: Any) -> None:
    """Write what `load_decoder` reads, but for the autoencoder, which is trained (and written) on its own."""
    from safetensors.torch import save_file

    conditioner.language_model.save_pretrained(folder / "reader")
    conditioner.tokenizer.save_pretrained(folder / "reader")
    save_file(conditioner.projector.state_dict(), folder / "projector.safetensors")
    transformer.half().save_pretrained(folder / "transformer")  # half the size; read back as float32
