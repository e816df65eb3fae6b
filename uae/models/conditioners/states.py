"""Conditions and the conditioners that read only the caption's text. They never see the image: text is the bottleneck."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uae.models.conditioners.prompts import PLACEHOLDER, check_template, prompt_ids
from uae.types import Rollout

Pooling = Literal["mean", "none"] | Tensor  # how a conditioner makes one vector per caption, or that vector


@dataclass(frozen=True)
class TextCondition:
    """Captions as plain text, for pipelines with their own text encoders."""

    texts: list[str]

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self.texts)

    def index(self, rows: Sequence[int]) -> TextCondition:
        """The condition of the given rows."""
        return TextCondition([self.texts[row] for row in rows])


@dataclass(frozen=True)
class EmbeddingCondition:
    """Embeddings per caption token.

    Args:
        embeds_NLD: Embeddings, padded on the right. The renderer ignores positions where the mask is 0.
        mask_NL: 1 for real tokens, 0 for padding.
        pooled_NP: One pooled vector per caption, or None.
    """

    embeds_NLD: Tensor
    mask_NL: Tensor
    pooled_NP: Tensor | None = None

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self.embeds_NLD)

    def index(self, rows: Sequence[int]) -> EmbeddingCondition:
        """The condition of the given rows."""
        at = list(rows)
        pooled = None if self.pooled_NP is None else self.pooled_NP[at]
        return EmbeddingCondition(self.embeds_NLD[at], self.mask_NL[at], pooled)


class TextConditioner:
    """Passes captions to the renderer as plain text."""

    truncated = 0

    def encode(self, texts: list[str], rollout: Rollout[Any] | None = None) -> TextCondition:
        """A condition of N rows for N captions."""
        return TextCondition(list(texts))

    def to(self, device: Any) -> TextConditioner:
        """Do nothing: there are no weights to move."""
        return self


def mlp_projector(width_in: int, width: int, width_out: int, activation: Literal["gelu", "silu"] = "gelu") -> nn.Sequential:
    """The projector g of the paper (UMM-1): Linear, activation, Linear, with random weights.

    Args:
        width_in: Width of the language model's hidden states.
        width: Width of the hidden layer.
        width_out: Width of the renderer's embeddings.
        activation: "gelu" is the exact GELU (UAE). "silu" is UniWorld-V1's, although its configuration says "mlp2x_gelu".

    Raises:
        ValueError: The activation is unknown.
    """
    activations = {"gelu": nn.GELU, "silu": nn.SiLU}
    if activation not in activations:
        raise ValueError(f"projector activation={activation!r}; allowed: {', '.join(activations)}")
    return nn.Sequential(nn.Linear(width_in, width), activations[activation](), nn.Linear(width, width_out))


class LanguageReader(nn.Module):
    """Base class of conditioners that read text with a language model, which they own or borrow.

    Args:
        language_model: A decoder-only Hugging Face model, or a function that returns one. A module is owned: it is moved,
            trained and saved with the conditioner. A function lends a model: it is called for every batch, so it can return
            the current policy; the conditioner never moves, trains or saves the model.
        weights: Context manager that is entered around each call of the language model, such as ``captioner.learner.reference``.
    """

    def __init__(
        self,
        language_model: nn.Module | Callable[[], nn.Module],
        weights: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.truncated = 0
        self.language_model = language_model if isinstance(language_model, nn.Module) else None
        self._borrow = None if isinstance(language_model, nn.Module) else language_model
        self.weights = weights

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """Enter the ``weights`` context and yield the language model."""
        with self.weights():
            yield self.language_model if self._borrow is None else self._borrow()


class HiddenStateConditioner(LanguageReader):
    """Projects the final hidden states of a language model that reads the caption (paper: c = g(h_T)).

    Args:
        language_model: A decoder-only Hugging Face model that takes ``input_ids`` and ``attention_mask``; or a function
            that returns it, see `LanguageReader`.
        tokenizer: Tokenizer of the language model.
        projector: Network from hidden states ``[..., D]`` to the renderer's embedding width. It may have its own dtype.
        template: Prompt with "{caption}" exactly once, see `uae.models.conditioners.prompts.chat_template`.
        max_tokens: Most tokens of a prompt, template included. Longer captions are cut and counted in ``truncated``, with a
            warning.
        pooled: Pooled vector per caption: "mean" of the projected embeddings, "none", or a constant ``[P]`` or ``[1, P]``.
        weights: Context manager that is entered around each call of the language model, such as ``captioner.learner.reference`` for
            the weights the run started from.
    """

    def __init__(
        self,
        language_model: nn.Module | Callable[[], nn.Module],
        tokenizer: Any,
        projector: nn.Module,
        template: str = PLACEHOLDER,
        max_tokens: int = 512,
        pooled: Pooling = "mean",
        weights: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(language_model, weights)
        check_template(template)
        self.projector = projector
        self.tokenizer, self.template, self.max_tokens = tokenizer, template, max_tokens
        self.pooled = pooling(pooled)

    def encode(self, texts: list[str], rollout: Rollout[Any] | None = None) -> EmbeddingCondition:
        """Embeddings of N captions, right-padded. A row does not depend on the other captions."""
        rows, cut = prompt_ids(self.tokenizer, self.template, texts, self.max_tokens)
        self.truncated += cut
        with self.reading() as reader:
            ids_NL, mask_NL = right_padded(rows, self.tokenizer, next(reader.parameters()).device)
            hidden_NLD = reader(input_ids=ids_NL, attention_mask=mask_NL, use_cache=False).last_hidden_state
        return projected(self.projector, hidden_NLD, mask_NL, self.pooled)


def right_padded(rows: list[list[int]], tokenizer: Any, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids ``[N, L]`` and their mask, int64. A row without tokens gets one padding token that counts as real."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    rows = [row or [pad] for row in rows]
    length = max(map(len, rows))
    ids_NL = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
    mask_NL = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids_NL, mask_NL


def pooling(pooled: Pooling) -> Pooling:
    """The value a conditioner keeps for its argument ``pooled``.

    A vector becomes a buffer ``[1, P]``, which moves with the conditioner and is not part of its state dict.

    Raises:
        ValueError: ``pooled`` is neither "mean" nor "none" nor a tensor.
    """
    if isinstance(pooled, Tensor):
        return nn.Buffer(pooled.detach().reshape(1, -1), persistent=False)
    if pooled not in ("mean", "none"):
        raise ValueError(f"conditioner pooled={pooled!r}; allowed: mean, none or a vector")
    return pooled


def projected(projector: nn.Module, hidden_NLD: Tensor, mask_NL: Tensor, pooled: Pooling) -> EmbeddingCondition:
    """Apply a projector to hidden states, on the projector's device and in its dtype.

    Args:
        projector: Network from ``[N, L, D]`` to the renderer's embedding width.
        hidden_NLD: Hidden states.
        mask_NL: 1 for real tokens. Where it is 0, the embeddings are set to 0.
        pooled: Pooled vector per caption: the "mean" over real tokens, "none", or a constant ``[1, P]``.
    """
    weight = next(projector.parameters(), hidden_NLD)
    mask_NL = mask_NL.to(weight.device)
    embeds_NLD = projector(hidden_NLD.to(weight.device, weight.dtype)) * mask_NL[..., None]
    pooled_NP = None
    if isinstance(pooled, Tensor):
        pooled_NP = pooled.to(embeds_NLD).expand(len(embeds_NLD), -1)
    elif pooled == "mean":
        pooled_NP = embeds_NLD.sum(1) / mask_NL.sum(1, keepdim=True)
    return EmbeddingCondition(embeds_NLD, mask_NL, pooled_NP)


def pad_to_length(condition: EmbeddingCondition, length: int) -> EmbeddingCondition:
    """Pad the token dimension with zeros on the right to ``length``. A longer condition is returned as it is."""
    missing = length - condition.embeds_NLD.shape[1]
    if missing <= 0:
        return condition
    after = (0, 0) * (condition.embeds_NLD.ndim - 2)  # some pipelines take the states of several layers: [N, L, layers, D]
    embeds = torch.nn.functional.pad(condition.embeds_NLD, (*after, 0, missing))
    return EmbeddingCondition(embeds, torch.nn.functional.pad(condition.mask_NL, (0, missing)), condition.pooled_NP)


def concatenated(conditions: Sequence[EmbeddingCondition]) -> EmbeddingCondition:
    """The rows of several conditions, padded to the longest one."""
    length = max(one.embeds_NLD.shape[1] for one in conditions)
    padded = [pad_to_length(one, length) for one in conditions]
    pooled = [one.pooled_NP for one in padded if one.pooled_NP is not None]
    embeds, mask = torch.cat([one.embeds_NLD for one in padded]), torch.cat([one.mask_NL for one in padded])
    return EmbeddingCondition(embeds, mask, torch.cat(pooled) if pooled else None)
