"""A conditioner that reads captions with the text encoders of a diffusers pipeline."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uae.models.conditioners.states import EmbeddingCondition, concatenated
from uae.models.pipelines.contracts import EMBEDS, MASKS, POOLED, contract_of, text_encoders_of
from uae.types import Rollout
from uae.weights.placement import Placement, at_work, settle, torch_dtype

KEY = "model.init_args.system.init_args.caption_tokens"


class PipelineTextConditioner:
    """Makes the embeddings that the pipeline itself makes from its prompts; implements `uae.types.Conditioner`.

    If the pipeline's text encoder pads to a fixed length, the denoiser was trained to attend to the padding, and the mask is
    all ones.

    Args:
        pipe: A diffusers pipeline with its text encoders.
        max_tokens: Most tokens of a caption that are read, if the pipeline has such a setting; None is its default.
        placement: Device and dtype of the text encoders, which are cast to that dtype.

    Raises:
        ValueError: The pipeline takes no embeddings, or ``max_tokens`` or the dtype is not possible for it.
    """

    def __init__(self, pipe: Any, max_tokens: int | None = None, placement: Placement = Placement()) -> None:  # noqa: B008
        self.pipe, self.placement, self.contract = pipe, placement, contract_of(pipe)
        name = type(pipe).__name__
        if not self.contract.takes_embeddings or not text_encoders_of(pipe):
            raise ValueError(f"{name} cannot turn captions into embeddings; use a TextConditioner")
        self.truncated = 0
        self.options = _options(pipe)
        if max_tokens is not None:
            if max_tokens < 1 or "max_sequence_length" not in self.options:
                fixed = "" if "max_sequence_length" in self.options else f"; {name} reads a fixed number, set it to null"
                raise ValueError(f"caption_tokens={max_tokens} must be at least 1{fixed}; change {KEY}")
            self.options["max_sequence_length"] = max_tokens
        if placement.dtype == "float8":
            raise ValueError(
                "text encoders cannot store 8-bit weights; set model.init_args.system.init_args.text_encoders.dtype to bfloat16"
            )
        self.device: torch.device | None = None
        for module in self.modules():
            module.requires_grad_(False).eval().to(torch_dtype(placement))

    def modules(self) -> list[nn.Module]:
        """The text encoders."""
        return list(text_encoders_of(self.pipe).values())

    def to(self, device: Any) -> PipelineTextConditioner:
        """Move the text encoders to their device, or to the CPU if they are offloaded."""
        self.device = torch.device(device)
        settle(self.modules(), self.placement, self.device)
        return self

    def encode(self, texts: list[str], rollout: Rollout[Any] | None = None) -> EmbeddingCondition:
        """A condition of N rows for N captions. Longer captions are cut and counted in ``truncated``, with a warning.

        Captions are read one at a time where one changes the embeddings of another, as in CogView4, which pads on the left.
        """
        self._count_truncated(texts)
        reads = [list(texts)] if self.contract.quirks.read_together else [[text] for text in texts]
        return concatenated([self._condition(self._encoded(prompt=prompts), "") for prompts in reads])

    def negative(self, text: str | None = None) -> EmbeddingCondition:
        """The negative condition of classifier-free guidance, one row.

        Args:
            text: The negative prompt; None is the pipeline's own default, which is not always the empty prompt.
        """
        if f"negative_{EMBEDS}" not in self.contract.encoded:
            return self._condition(self._encoded(prompt=[text or ""]), "")
        default = inspect.signature(type(self.pipe).__call__).parameters["negative_prompt"].default
        negative = default if text is None else text
        negative = negative if negative is None else [negative]
        encoded = self._encoded(prompt=[""], do_classifier_free_guidance=True, negative_prompt=negative)
        return self._condition(encoded, "negative_")

    @torch.no_grad()
    def _encoded(self, **arguments: Any) -> dict[str, Any]:
        """What ``encode_prompt`` returns, by name: tensors, lists of one tensor per caption, or None."""
        takes = _parameters(self.pipe)
        home = self.device or next(self.modules()[0].parameters()).device
        with at_work(self.modules(), self.placement, home) as work, _quiet(type(self.pipe).__module__):
            # every encoder must read the caption: pipelines use `prompt` where `prompt_2` or `prompt_3` is None
            usual = {"device": work, "num_images_per_prompt": 1, "prompt_2": None, "prompt_3": None}
            arguments = {**usual, "do_classifier_free_guidance": False, **self.options, **arguments}
            outputs = self.pipe.encode_prompt(**{name: value for name, value in arguments.items() if name in takes})
        return dict(zip(self.contract.encoded, outputs if isinstance(outputs, tuple) else (outputs,), strict=False))

    def _condition(self, encoded: dict[str, Any], sign: str) -> EmbeddingCondition:
        embeds_NLD = encoded[sign + EMBEDS]
        if isinstance(embeds_NLD, list):
            return concatenated([EmbeddingCondition(row[None], _ones(row[None])) for row in embeds_NLD])
        masks = [encoded.get(sign + name) for name in MASKS]
        mask_NL = next((mask for mask in masks if mask is not None), None)
        if mask_NL is None or self.contract.quirks.reads_padding:
            mask_NL = _ones(embeds_NLD)
        return EmbeddingCondition(embeds_NLD, mask_NL.to(torch.long), encoded.get(sign + POOLED))

    def _count_truncated(self, texts: list[str]) -> None:
        limit, lengths = self._lengths(texts)
        longer = sum(length > limit for length in lengths)
        self.truncated += longer
        if longer:
            choice = f"raise {KEY}, or " if "max_sequence_length" in self.options else ""
            warnings.warn(
                f"{longer} of {len(texts)} captions are longer than the {limit} tokens that {type(self.pipe).__name__} reads "
                f"(the longest has {max(lengths)}); the rest is cut. To change this, {choice}lower "
                "model.init_args.sampling.max_tokens",
                stacklevel=3,
            )

    def _lengths(self, texts: list[str]) -> tuple[int, list[int]]:
        """The limit of the text encoder with the highest limit, and the lengths of the captions in its tokens."""
        limits = []
        for tokenizer in _tokenizers(self.pipe):
            clip = "CLIP" in type(tokenizer).__name__
            limit = tokenizer.model_max_length if clip else None
            limits.append((limit or self.options.get("max_sequence_length") or tokenizer.model_max_length, tokenizer))
        limit, tokenizer = max(limits, key=lambda pair: pair[0])
        before, around = self._around(tokenizer)
        ids = tokenizer([around.replace("{}", text) for text in texts], verbose=False)["input_ids"]
        return limit, [len(row) - before for row in ids]

    def _around(self, tokenizer: Any) -> tuple[int, str]:
        """The number of tokens before the caption that do not count, and the text around the caption (its place is "{}")."""
        if hasattr(self.pipe, "prompt_template_encode"):  # Qwen-Image
            return self.pipe.prompt_template_encode_start_idx, self.pipe.prompt_template_encode
        instruction = self.options.get("complex_human_instruction")  # Sana
        if instruction:
            lead = "\n".join(instruction)
            return len(tokenizer(lead, verbose=False)["input_ids"]) - 2, lead + "{}"
        return 0, "{}"


@torch.no_grad()
def empty_pooled(pipeline: Path, suffixes: Sequence[str], projected: bool) -> Tensor:
    """The pooled vector ``[P]`` of the empty caption: what a decoder gets if no CLIP reads its captions.

    Args:
        pipeline: Folder of a pipeline with ``tokenizer`` and ``text_encoder`` subfolders.
        suffixes: Endings of those subfolders' names, one per CLIP text encoder; the vectors are concatenated.
        projected: Take the projected embedding (Stable Diffusion 3) instead of the pooled state (FLUX).
    """
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    pooled = []
    for suffix in suffixes:
        folder = pipeline / f"tokenizer{suffix}"
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
        clip: Any = CLIPTextModelWithProjection if projected else CLIPTextModel
        output = clip.from_pretrained(pipeline / f"text_encoder{suffix}", local_files_only=True).float()(ids)
        pooled.append((output.text_embeds if projected else output.pooler_output)[0])
    return torch.cat(pooled)


def _ones(embeds_NLD: Tensor) -> Tensor:
    """A mask of ones."""
    return torch.ones(embeds_NLD.shape[:2], dtype=torch.long, device=embeds_NLD.device)


def _parameters(pipe: Any) -> Any:
    return inspect.signature(type(pipe).encode_prompt).parameters


def _tokenizers(pipe: Any) -> list[Any]:
    """The pipeline's tokenizers; of a processor of text and images, the tokenizer in it."""
    from transformers import ProcessorMixin

    parts = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "processor")]
    whole = [part.tokenizer if isinstance(part, ProcessorMixin) else part for part in parts]  # ChatGLM's has a tokenizer, too
    return [tokenizer for tokenizer in whole if tokenizer is not None]


def _options(pipe: Any) -> dict[str, Any]:
    """Options of ``encode_prompt`` with the defaults of ``__call__``, which can differ from its own defaults."""
    call = inspect.signature(type(pipe).__call__).parameters
    about = ("max_sequence_length", "clean_caption", "complex_human_instruction", "system_prompt")
    options = {name: call[name].default for name in about if name in call and name in _parameters(pipe)}
    if "max_sequence_length" in options and options["max_sequence_length"] is None:
        options["max_sequence_length"] = getattr(pipe, "default_max_sequence_length", None)  # Nucleus
    return options


@contextmanager
def _quiet(module: str) -> Iterator[None]:
    """Inside, a module of diffusers logs only errors. Otherwise it would log the end of every caption that it cuts."""
    logger = logging.getLogger(module)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
