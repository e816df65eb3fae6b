"""LEAKS: hidden states of the caption's tokens, which attend to the image. For comparison with the official cold start only."""

from __future__ import annotations

from typing import Any

from torch import nn

from uae.models.conditioners.prompts import warn_truncated
from uae.models.conditioners.states import EmbeddingCondition, Pooling, pooling, projected
from uae.types import Rollout


class AnswerStateConditioner(nn.Module):
    """Projects the hidden states of the caption's tokens in the sequence of image, question and caption.

    This is **not** a text bottleneck. The states attend to the image, so content that the caption does not mention can reach
    the renderer, and the reward of the reconstruction says little about the caption. UAE's official cold start conditions
    this way. Use this class to reproduce it or to measure the leak. `HiddenStateConditioner` reads only the text.

    Args:
        captioner: A `uae.models.captioners.captioner.HFCaptioner`. This class does not own it: it never moves, trains or
            saves it.
        projector: Network from hidden states ``[..., D]`` to the renderer's embedding width.
        pooled: Pooled vector per caption: "mean" of the projected embeddings, "none", or a constant ``[P]`` or ``[1, P]``.
        max_tokens: Most tokens of a caption, its end-of-sequence token included. Longer captions are cut and counted in
            ``truncated``, with a warning.
    """

    def __init__(
        self,
        captioner: Any,
        projector: nn.Module,
        pooled: Pooling = "mean",
        max_tokens: int = 512,
    ) -> None:
        super().__init__()
        self.truncated = 0
        self.captioner, self.projector, self.max_tokens = captioner, projector, max_tokens
        self.pooled = pooling(pooled)

    def encode(self, texts: list[str], rollout: Rollout[Any] | None = None) -> EmbeddingCondition:
        """Embeddings of the rollout's N captions, right-padded.

        Args:
            texts: The captions of the rollout. Only the rollout's tokens are read.
            rollout: The rollout that wrote the captions.

        Raises:
            ValueError: There is no rollout, or its captions are not ``texts``.
        """
        if rollout is None:
            raise ValueError(
                "answer states exist only where a caption was written beside its image, and there is no rollout: condition "
                "on text (model.init_args.system.init_args.condition_on: text) to draw from captions alone"
            )
        if list(texts) != rollout.texts:
            raise ValueError("answer states are of the rollout's own captions, but other texts were given with it")
        cut = int((rollout.mask_RS.sum(1) > self.max_tokens).sum())
        if cut:
            self.truncated += cut
            warn_truncated(cut, len(texts), self.max_tokens)
        length = min(self.max_tokens, int(rollout.mask_RS.sum(1).max()))
        hidden_NTD = self.captioner.learner.network.hidden(rollout.context, rollout.tokens_NT[:, :length], rollout.group)
        return projected(self.projector, hidden_NTD, rollout.mask_RS[:, :length].long(), self.pooled)
