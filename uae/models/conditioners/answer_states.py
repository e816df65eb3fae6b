"""LEAKS: the caption's states as they were beside the image. The official cold start's conditioning, for parity and ablation."""

from __future__ import annotations

from typing import Any

from torch import nn

from uae.models.conditioners.prompts import warn_truncated
from uae.models.conditioners.states import EmbeddingCondition, Pooling, pooling, projected
from uae.types import Rollout


class AnswerStateConditioner(nn.Module):
    """Hidden states at the caption's tokens in the sequence of image, question and caption, through a projector.

    This is **not** a text bottleneck. The states attend to the image: whatever the caption leaves out can reach the
    renderer through them, and a reward for the reconstruction then says little about the caption. UAE's official cold start
    conditions this way. Use it to reproduce that, or to measure the leak; `HiddenStateConditioner` reads text alone.

    Args:
        captioner: A `uae.models.captioners.captioner.HFCaptioner`. It is borrowed: never moved, trained or saved from here.
        projector: Maps ``[..., D]`` to the renderer's embedding width.
        pooled: "mean" of the projected embeddings, "none", or one vector ``[P]`` or ``[1, P]`` that serves every caption.
        max_tokens: Longest caption, its end-of-sequence token included; a longer one is cut, counted and warned of.
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
        """The rollout's N captions to embeddings, right-padded. ``texts`` are not read: the rollout has their tokens.

        Raises:
            ValueError: Without a rollout, or with that of other captions.
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
