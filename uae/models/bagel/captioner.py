"""BAGEL as a captioner, and the network that is at the same time its renderer.

Facts from the official inference code: there is no chat template. A text is ``<|im_start|>``, its tokens, ``<|im_end|>``, one
rotary position each. An image that is read is ``<|vision_start|>``, its tokens, ``<|vision_end|>``; all of them share one
position, and see each other. An answer follows a ``<|im_start|>`` that is given, so it is no action, and ends with
``<|im_end|>``, which is one. An image that is drawn is a block like one that is read, with other weights for its latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from uae.learner import Half, Learner
from uae.models.bagel.model import Bagel
from uae.models.bagel.pixels import Scaling, patches, scaled
from uae.models.bagel.prompts import PromptCondition
from uae.models.captioners.caches import library_cache, select
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.features import ImageFeatures
from uae.models.captioners.policy import CaptionPolicy, Prefix, VLMContext


@dataclass(frozen=True)
class Marks:
    """Ids of the special tokens around texts and images."""

    begin: int
    end: int
    image_begin: int
    image_end: int


def marks_of(tokenizer: Any) -> Marks:
    """The marks of a tokenizer.

    Raises:
        ValueError: It lacks one.
    """
    names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    for name, number in zip(names, ids, strict=True):
        if number is None or tokenizer.convert_ids_to_tokens(number) != name:
            raise ValueError(f"the tokenizer has no {name}; allowed: BAGEL's; change model.init_args.system.init_args.checkpoint")
    return Marks(*ids)


class BagelProcessor:
    """Tokenizer and image scaling, and how both are saved.

    Args:
        tokenizer: The checkpoint's tokenizer.
        scaling: How images are scaled that are read.
    """

    chat_template = None

    def __init__(self, tokenizer: Any, scaling: Scaling) -> None:
        self.tokenizer, self.scaling = tokenizer, scaling

    def batch_decode(self, rows: Sequence[Tensor], skip_special_tokens: bool = True) -> list[str]:
        """Token ids as texts."""
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens)
        return texts

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


class BagelPolicy(CaptionPolicy):
    """Captions and denoising steps of one network.

    Args:
        model: A `Bagel`, or a PeftModel around one.
        banned_ids: Ids of tokens that no caption has.
        marks: Ids of the marks.
        gradient_checkpointing: See `CaptionPolicy`.
    """

    used_only_for: Mapping[Half, str] = MappingProxyType(
        {"captions": r"(lm_head|connector|vit_model)\.", "images": r"(_moe_gen|vae2llm|llm2vae|time_embedder)\b"}
    )

    def __init__(self, model: nn.Module, banned_ids: Sequence[int], marks: Marks, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, banned_ids, gradient_checkpointing)
        self.marks = marks

    def forward(self, context: VLMContext | PromptCondition, *arguments: Any) -> Tensor:
        """Log-probs of captions given images, or velocities of latents given captions; with gradient."""
        if isinstance(context, PromptCondition):
            with self._recomputing():
                return self.velocity(context, *arguments)
        return super().forward(context, *arguments)

    @property
    def tower_learns(self) -> bool:
        """Whether weights of the image tower learn. What comes behind it is computed in every pass."""
        return any(weight.requires_grad or "lora_" in name for name, weight in self.base.vit_model.named_parameters())

    def prefill(self, context: VLMContext, cache: Any = None, keep_features: bool = False) -> Prefix:
        """Run the prompt of every image once, see `CaptionPolicy.prefill`."""
        rows, model = context.rows, self.base
        known = context.features
        seen = self._seen(context) if known is None else [features for (features,) in known.rows]
        tokens = [model.image_tokens(x, *grid) for x, grid in zip(seen, rows["grid"].tolist(), strict=True)]
        embeds_BPD = model.get_input_embeddings()(rows["input_ids"])
        embeds_BPD = embeds_BPD.masked_scatter(rows["image"][..., None], torch.cat(tokens).to(embeds_BPD.dtype))
        mask_BP, block_BP = rows["attention_mask"], rows["block"]
        cache = library_cache(model) if cache is None else cache
        hidden_BPD = model.get_decoder()(
            inputs_embeds=embeds_BPD, attention_mask=visible(mask_BP, block_BP), position_ids=rows["position"],
            cache=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        if known is None and keep_features and not self.tower_learns:
            known = ImageFeatures(partial(SimpleNamespace), (2,), tuple((x.detach(),) for x in seen))
        return Prefix(cache, hidden_BPD[:, -1], mask_BP, rows["position"][:, -1] + 1, known)

    def _seen(self, context: VLMContext) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tower_learns):
            grids = context.rows["grid"].tolist()
            return [self.base.features(x, *grid) for x, grid in zip(context.patches, grids, strict=True)]

    def advance(self, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
        """Feed caption tokens after a prefix, see `CaptionPolicy.advance`."""
        N, T = tokens_NT.shape
        position_NT = prefix.offset_N[:, None] + torch.arange(T, device=tokens_NT.device)
        prefix.offset_N = prefix.offset_N + T
        prefix.mask_NP = torch.cat([prefix.mask_NP, prefix.mask_NP.new_ones(N, T)], dim=1)
        hidden_NTD: Tensor = self.base.get_decoder()(
            input_ids=tokens_NT, attention_mask=visible(prefix.mask_NP, last=T), position_ids=position_NT,
            cache=prefix.cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        return hidden_NTD

    def remember(self, prompts: PromptCondition) -> Any:
        """The keys and values of prompts, for `velocity`; None for prompts without tokens."""
        ids_NL, mask_NL = prompts.ids_NL.to(self.banned_ids.device), prompts.mask_NL.to(self.banned_ids.device)
        if ids_NL.shape[1] == 0:
            return None
        cache, position_NL = library_cache(self.base), (mask_NL.cumsum(1) - 1).clamp(min=0)
        self.base.get_decoder()(
            input_ids=ids_NL, attention_mask=visible(mask_NL), position_ids=position_NL, cache=cache, use_cache=True
        )
        return cache

    def velocity(self, prompts: PromptCondition, x_NLP: Tensor, t_N: Tensor, rows: int, cache: Any = None) -> Tensor:
        """The velocity ``[N, L, P]`` of latents behind their prompts, in at least float32. It points from image to noise.

        Args:
            prompts: N prompts, possibly without any token.
            x_NLP: L latent tokens of each image.
            t_N: Times from 1 (noise) to 0 (image).
            rows: How many rows of the image the L tokens are.
            cache: What `remember` has made of the prompts. None computes them, too; the result is the same up to rounding.
        """
        model, device = self.base, self.banned_ids.device
        ids_NL, mask_NL = prompts.ids_NL.to(device), prompts.mask_NL.to(device)
        (N, L), K = ids_NL.shape, x_NLP.shape[1]
        begin_ND, end_ND = model.get_input_embeddings()(torch.tensor([self.marks.image_begin, self.marks.image_end], device=device))
        latents_NKD = model.latent_tokens(x_NLP, t_N.to(device), rows).to(begin_ND.dtype)
        block_NPD = torch.cat([begin_ND.expand(N, 1, -1), latents_NKD, end_ND.expand(N, 1, -1)], dim=1)
        mask_NP = torch.cat([mask_NL, mask_NL.new_ones(N, K + 2)], dim=1)
        own_NP = torch.cat([mask_NL.new_zeros(N, L), mask_NL.new_ones(N, K + 2)], dim=1)
        position_NP = torch.cat([(mask_NL.cumsum(1) - 1).clamp(min=0), mask_NL.sum(1)[:, None].expand(N, K + 2)], dim=1)
        see, given = visible(mask_NP, own_NP, None if cache is None else K + 2), 0
        if cache is None:
            block_NPD = torch.cat([model.get_input_embeddings()(ids_NL), block_NPD], dim=1)
            given = L
        else:
            position_NP, cache = position_NP[:, L:], select(cache, torch.arange(N))
        hidden_NPD = model.get_decoder()(
            inputs_embeds=block_NPD, attention_mask=see, position_ids=position_NP, cache=cache, use_cache=cache is not None,
            drawn=(given + 1, given + 1 + K),
        ).last_hidden_state  # fmt: skip
        velocity: Tensor = model.llm2vae(hidden_NPD[:, given + 1 : given + 1 + K])
        return velocity if velocity.dtype == torch.float64 else velocity.float()


class BagelCaptioner(HFCaptioner):
    """Captions with BAGEL; implements `uae.types.Captioner`.

    An image is scaled once, as in the official benchmarks (``Bagel.chat``). The official demonstration scales twice.

    Args:
        model: A `Bagel`.
        processor: Its tokenizer and the scaling of images.
        instruction: The question put behind every image.
        gradient_checkpointing: See `CaptionPolicy`.
    """

    learner: Learner[BagelPolicy]

    def __init__(self, model: Bagel, processor: BagelProcessor, instruction: str, gradient_checkpointing: bool = False) -> None:
        tokenizer, self.marks = processor.tokenizer, marks_of(processor.tokenizer)
        self.processor, self.instruction, self.image_first = processor, instruction, True
        self.end_ids, self.pad_id = [self.marks.end], self.marks.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        unknown = range(len(tokenizer), model.config.text_config.vocab_size)
        banned = sorted({*special, self.pad_id, *unknown} - {self.marks.end})
        self.learner = Learner(BagelPolicy(model, banned, self.marks, gradient_checkpointing))

    def prepare(self, images_BCHW: Tensor, instruction: str | Sequence[str] | None = None) -> VLMContext:
        """Images ``[B, 3, H, W]`` in [0, 1] (or a list of ``[3, H, W]`` of any sizes) to the model's inputs.

        Every prompt is an image block, the question, and the mark that begins an answer; the left is padded.

        Raises:
            ValueError: A question has special tokens.
        """
        asked = self.instruction if instruction is None else instruction
        questions = [asked] * len(images_BCHW) if isinstance(asked, str) else list(asked)
        side, marks = self.processor.scaling.patch, self.marks
        pictures = [scaled(image, self.processor.scaling) for image in images_BCHW]
        grids = [(picture.shape[1] // side, picture.shape[2] // side) for picture in pictures]
        prompts = []
        for (rows, columns), question in zip(grids, questions, strict=True):
            ids = self._ids(question)
            count = rows * columns + 2
            block = [marks.image_begin, *[self.pad_id] * (count - 2), marks.image_end]
            text = [marks.begin, *ids, marks.end, marks.begin]
            prompts.append((block, text))
        longest = max(len(block) + len(text) for block, text in prompts)
        given = [_row(block, text, longest, self.pad_id) for block, text in prompts]
        tensors = {name: torch.tensor([row[name] for row in given], device=self.device) for name in given[0]}
        tensors["image"] = tensors["image"].bool()
        tensors["grid"] = torch.tensor(grids)
        return VLMContext(tensors, tuple(patches(x, side).to(self.device) for x in pictures), tuple(images_BCHW))

    def _ids(self, question: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        ids: list[int] = tokenizer(question, add_special_tokens=False)["input_ids"]
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        if found := [number for number in ids if number in special]:
            raise ValueError(
                f"the instruction {question!r} has the special token {tokenizer.convert_ids_to_tokens(found[0])!r}; allowed: text "
                "without special tokens; change model.init_args.instruction, or model.init_args.system.init_args.reading.instruction"
            )
        return ids


def _row(block: list[int], text: list[int], longest: int, pad: int) -> dict[str, list[int]]:
    """One prompt with padding on the left: ids, what is a token, what is part of the image, its block, and positions."""
    left, count = longest - len(block) - len(text), len(block)
    return {
        "input_ids": [pad] * left + block + text,
        "attention_mask": [0] * left + [1] * (count + len(text)),
        "image": [0] * (left + 1) + [1] * (count - 2) + [0] * (1 + len(text)),
        "block": [0] * left + [1] * count + [0] * len(text),
        "position": [0] * left + [0] * count + list(range(1, 1 + len(text))),
    }


def visible(mask_NP: Tensor, block_NP: Tensor | None = None, last: int | None = None) -> Tensor:
    """Which tokens see which, bool ``[N, 1, last, P]``: those before them, and those of their own block.

    Args:
        mask_NP: 1 for tokens, 0 for padding, which only padding itself sees.
        block_NP: 1 for the tokens of the one image block; None if there is none.
        last: How many tokens, counted from the end, the rows are of; None is all.
    """
    column_P = torch.arange(mask_NP.shape[1], device=mask_NP.device)
    row_Q = column_P if last is None else column_P[-last:]
    see_NQP = (column_P <= row_Q[:, None])[None]
    if block_NP is not None:
        see_NQP = see_NQP | (block_NP[:, row_Q, None] * block_NP[:, None]).bool()
    return ((see_NQP & mask_NP[:, None].bool()) | (column_P == row_Q[:, None]))[:, None]
