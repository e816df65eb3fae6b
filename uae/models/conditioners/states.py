"""Caption text to whatever a renderer is conditioned on. The image is never seen: text is the bottleneck."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uae.models.conditioners.prompts import PLACEHOLDER, check_template, prompt_ids
from uae.models.conditioners.prompts import chat_template as chat_template  # beside what it is an argument of
from uae.types import Rollout

Pooling = Literal["mean", "none"] | Tensor  # how a conditioner makes one vector per caption, or that vector


@dataclass(frozen=True)
class TextCondition:
    """Plain captions, for pipelines that bring their own text encoders."""

    texts: list[str]

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self.texts)

    def index(self, rows: Sequence[int]) -> TextCondition:
        """The condition of some of its rows."""
        return TextCondition([self.texts[row] for row in rows])


@dataclass(frozen=True)
class EmbeddingCondition:
    """Embeddings per caption token.

    Args:
        embeds_NLD: Padded on the right; positions where the mask is 0 are ignored by the renderer.
        mask_NL: 1 for real tokens.
        pooled_NP: One vector per caption, or None.
    """

    embeds_NLD: Tensor
    mask_NL: Tensor
    pooled_NP: Tensor | None = None

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self.embeds_NLD)

    def index(self, rows: Sequence[int]) -> EmbeddingCondition:
        """The condition of some of its rows."""
        at = list(rows)
        pooled = None if self.pooled_NP is None else self.pooled_NP[at]
        return EmbeddingCondition(self.embeds_NLD[at], self.mask_NL[at], pooled)


class TextConditioner:
    """Hands the caption over as text."""

    truncated = 0

    def encode(self, texts: list[str], rollout: Rollout | None = None) -> TextCondition:
        """N captions to N rows."""
        return TextCondition(list(texts))

    def to(self, device: Any) -> TextConditioner:
        """Nothing to move."""
        return self


def mlp_projector(
    width_in: int, width: int, width_out: int, activation: Literal["gelu", "silu"] = "gelu"
) -> nn.Sequential:
    """Linear, activation, Linear: the projector g of the paper (UMM-1), from hidden states to the renderer's conditioning.

    UAE's activation is the exact GELU; UniWorld-V1's is SiLU, though its configuration says "mlp2x_gelu".
    """
    activations = {"gelu": nn.GELU, "silu": nn.SiLU}
    if activation not in activations:
        raise ValueError(f"projector activation={activation!r}; allowed: {', '.join(activations)}")
    return nn.Sequential(nn.Linear(width_in, width), activations[activation](), nn.Linear(width, width_out))


class LanguageReader(nn.Module):
    """A language model that reads text for a conditioner: its own, or one that belongs to somebody else.

    Args:
        language_model: A decoder-only Hugging Face model. A module is owned: it is moved, trained and saved along. A
            function that returns one borrows it: it is asked at every call, so it may hand out the policy in force, and
            what it returns is never moved, trained or saved from here.
        weights: Context manager that is entered around every call, such as ``captioner.learner.reference``.
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
        """The model to call, with the weights to call it with."""
        with self.weights():
            yield self.language_model if self._borrow is None else self._borrow()


class HiddenStateConditioner(LanguageReader):
    """Final hidden states of a language model that reads the caption, through an MLP projector (paper: c = g(h_T)).

    Args:
        language_model: A decoder-only Hugging Face model, called with ``input_ids`` and ``attention_mask``; or a function
            that returns the one to call, see `LanguageReader`.
        tokenizer: Its tokenizer.
        projector: Maps ``[..., D]`` to the renderer's embedding width, in a precision of its own.
        template: Text around the caption; must contain one "{caption}". See `uae.models.conditioners.prompts.chat_template`.
        max_tokens: Longest prompt, template included. A longer caption is cut, counted in ``truncated`` and warned of.
        pooled: "mean" of the projected embeddings, "none", or one vector ``[P]`` or ``[1, P]`` that serves every caption.
        weights: Context manager entered around the language model, such as ``captioner.learner.reference`` for the weights the
            run started from.
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

    def encode(self, texts: list[str], rollout: Rollout | None = None) -> EmbeddingCondition:
        """N captions to embeddings, right-padded; a row does not depend on the padding."""
        rows, cut = prompt_ids(self.tokenizer, self.template, texts, self.max_tokens)
        self.truncated += cut
        with self.reading() as reader:
            ids_NL, mask_NL = right_padded(rows, self.tokenizer, next(reader.parameters()).device)
            hidden_NLD = reader(input_ids=ids_NL, attention_mask=mask_NL, use_cache=False).last_hidden_state
        return projected(self.projector, hidden_NLD, mask_NL, self.pooled)


def right_padded(rows: list[list[int]], tokenizer: Any, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids ``[N, L]`` and their mask, int64. A row without tokens reads one padding token."""
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
    """Hidden states through a projector, where and in what precision it works; zero where the mask is."""
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
    """Zero-pad the token dimension on the right up to ``length``."""
    missing = length - condition.embeds_NLD.shape[1]
    if missing <= 0:
        return condition
    embeds = torch.nn.functional.pad(condition.embeds_NLD, (0, 0, 0, missing))
    return EmbeddingCondition(embeds, torch.nn.functional.pad(condition.mask_NL, (0, missing)), condition.pooled_NP)
