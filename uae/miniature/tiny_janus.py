"""The miniature of UMM-2: one tiny Janus whose language model writes captions and image tokens.

    captioner    vision tower and aligner (9 tokens, one per cell of the scene), Llama, words
    renderer     the same Llama, generation head, 9 image tokens, decoder of the vector-quantising autoencoder

An image token says what its cell holds and the background of the scene, see `scene_codes`. The weights in
``tiny_janus_weights/`` are in transformers' own layout and loaded by its own loaders. Reward encoder and judges are the
first miniature's, see `uae.miniature.tiny`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uae.miniature.scenes import SIDE, WORDS, Scene
from uae.miniature.scenes.world import BACKGROUNDS, CELL, COLORS, GRID, KINDS, SHAPES, SIZES, cell_codes
from uae.miniature.tiny import INSTRUCTION, word_level
from uae.models.tokens.janus import TokenConditioner, unify
from uae.models.tokens.policy import LogProb, TokenSampling
from uae.types import UMM
from uae.weights.checksums import verify

WEIGHTS = Path(__file__).parent / "tiny_janus_weights"
CODES = len(BACKGROUNDS) * KINDS
PAD, BEGIN, END, IMAGE_BEGIN, IMAGE_END, IMAGE, UNKNOWN = (
    "<|pad|>", "<|begin|>", "<|end|>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>", "<|unk|>",
)  # fmt: skip
TEMPLATE = " user: {caption} assistant: "  # as the chat template writes it; the tokenizer knows no whitespace
VOCABULARY = [PAD, BEGIN, END, IMAGE_BEGIN, IMAGE_END, IMAGE, UNKNOWN, "user:", "assistant:", INSTRUCTION, *WORDS]
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}{{ ' ' + message['role'] + ':' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ ' <image_placeholder>' }}"
    "{% else %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ ' <|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant:' }}{% endif %}"
)


class TinyJanus:
    """The miniature of UMM-2 as a `uae.types.System`: one root for captions and images.

    Args:
        weights: Folder of cold-started weights; the default ships with the package.
        guidance: Classifier-free guidance of image tokens; 1 means none.
        cfg_logprob: Which distribution log-probs are taken from under guidance, see `uae.models.tokens.policy.TokenSampling`.
    """

    def __init__(self, weights: str | None = None, guidance: float = 1.0, cfg_logprob: LogProb = "guided") -> None:
        self.weights = weights
        self.sampling = TokenSampling(guidance, cfg_logprob=cfg_logprob)

    def build(self) -> UMM:
        """Load the one model that is captioner and renderer."""
        folder = Path(self.weights) if self.weights else WEIGHTS
        verify(folder)
        return assemble(*load(folder), self.sampling)


def assemble(model: Any, janus_processor: Any, sampling: TokenSampling) -> UMM:
    """Captioner, conditioner and renderer from one Janus.

    Args:
        model: A ``JanusForConditionalGeneration`` as `create` makes it.
        janus_processor: The ``JanusProcessor`` of the model, as `processor` makes it.
        sampling: How image tokens are drawn.
    """
    from uae.models.captioners.captioner import HFCaptioner

    umm = unify(HFCaptioner(model, janus_processor, INSTRUCTION), sampling, rows=64)
    return replace(umm, conditioner=TokenConditioner(janus_processor.tokenizer, TEMPLATE, max_tokens=64))


def scene_codes(scenes: list[Scene]) -> Tensor:
    """The true image tokens of complete scenes, ``[N, 9]``: background times ``KINDS`` plus the cell's code."""
    backgrounds_N1 = torch.tensor([[list(BACKGROUNDS).index(scene.background or "")] for scene in scenes])
    return backgrounds_N1 * KINDS + cell_codes(scenes)


def tokenizer() -> Any:
    """One token per word."""
    images = {"image_token": IMAGE, "boi_token": IMAGE_BEGIN, "eoi_token": IMAGE_END}
    return word_level(VOCABULARY, UNKNOWN, bos_token=BEGIN, eos_token=END, pad_token=PAD, extra_special_tokens=images)


def processor() -> Any:
    """The Janus processor for 24 x 24 images of 9 tokens."""
    from transformers import JanusImageProcessor, JanusProcessor

    image = JanusImageProcessor(size={"height": SIDE, "width": SIDE}, min_size=1, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return JanusProcessor(image, tokenizer(), chat_template=CHAT_TEMPLATE, num_image_tokens=GRID * GRID)


def create(width: int = 128, layers: int = 4, channels: int = 64) -> Any:
    """A Janus with random weights.

    Args:
        width: Hidden size of the language model, a multiple of 32.
        layers: Number of layers of the language model.
        channels: Channels of the autoencoder, a multiple of 32 and at least 64. Its norms have 32 groups, and a norm over
            a group of one channel would remove the background color.
    """
    from transformers import JanusConfig, JanusForConditionalGeneration

    ids = {word: i for i, word in enumerate(VOCABULARY)}
    text = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 32, "num_key_value_heads": width // 32, "vocab_size": len(VOCABULARY),
        "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "bos_token_id": ids[BEGIN], "eos_token_id": ids[END], "pad_token_id": ids[PAD], "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": CELL,
        "mlp_ratio": 2.0, "projection_dim": width, "num_image_tokens": GRID * GRID,
    }  # fmt: skip
    quantizer = {
        "embed_dim": 32, "num_embeddings": CODES, "latent_channels": channels, "base_channels": channels,
        "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 0, "num_patches": GRID, "projection_dim": width,
        "image_token_embed_dim": width,
    }  # fmt: skip
    configuration: Any = JanusConfig  # its base class takes the ids of words
    config = configuration(
        text_config=text, vision_config=vision, vq_config=quantizer, image_token_id=ids[IMAGE],
        bos_token_id=ids[BEGIN], eos_token_id=ids[END], pad_token_id=ids[PAD],
    )  # fmt: skip
    model = JanusForConditionalGeneration(config)
    model.generation_config = _generation(ids)
    return _well_started(model)


def _generation(ids: dict[str, int]) -> Any:
    """Settings for ``generate`` of transformers. Settings derived from the config would lose the image token on loading."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=ids[BEGIN], eos_token_id=ids[END], pad_token_id=ids[PAD],
        generation_kwargs={"boi_token_id": ids[IMAGE_BEGIN]},
    )  # fmt: skip


@torch.no_grad()
def _well_started(model: Any) -> Any:
    """Initialise tables in place so that the model learns fast.

    Codes that share attributes start with similar vectors, as in a trained codebook. Position embeddings start far apart,
    because small ones take long to learn.
    """
    inner, attributes = model.model, _attributes()
    for table, scale in (
        (inner.vqmodel.quantize.embedding.weight, 0.5),  # decoding normalises it to length 1
        (inner.generation_embeddings.weight, 0.5),
        (inner.generation_head.vision_head.weight, 0.05),
    ):
        table.copy_(scale * attributes @ torch.randn(attributes.shape[1], table.shape[1]))
    codebook = inner.vqmodel.quantize.embedding.weight
    codebook.div_(codebook.norm(dim=1, keepdim=True))
    inner.vision_model.embeddings.position_embedding.weight.normal_(0, 0.5)
    return model


def _attributes() -> Tensor:
    """Every code's background, shape, size and color, one-hot: ``[codes, 20]``."""
    kinds = torch.cartesian_prod(torch.arange(len(SHAPES)), torch.arange(len(SIZES)), torch.arange(len(COLORS)))
    parts = [torch.eye(n)[column] for n, column in zip((len(SHAPES), len(SIZES), len(COLORS)), kinds.T, strict=True)]
    drawn = torch.cat(parts, dim=1)
    empty_or_drawn = torch.block_diag(torch.ones(1, 1), drawn)
    backgrounds = torch.eye(len(BACKGROUNDS)).repeat_interleave(KINDS, 0)
    return torch.cat([backgrounds, empty_or_drawn.repeat(len(BACKGROUNDS), 1)], dim=1)


def load(folder: Path) -> tuple[Any, Any]:
    """Load model and processor with transformers' own loaders; the weights are converted to float32."""
    from transformers import AutoProcessor, JanusForConditionalGeneration

    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def save(folder: Path, model: Any) -> None:
    """Write what `load` reads, in half precision."""
    model.cpu().half().save_pretrained(folder)
    processor().save_pretrained(folder)
