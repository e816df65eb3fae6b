"""Supervised fine-tuning of any captioner on the captions of a data set."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from uae.coldstart.system_objective import SystemObjective, hf_captioner, save_captioner
from uae.types import UMM, ImageBatch


class CaptionTuning(SystemObjective):
    """Cross-entropy of captions under the captioner (arXiv 2509.09666: the cold start of the encoder).

    ``model.init_args.finetune`` of the run decides which weights train: `uae.models.finetune.LoRA` or ``Full``. At the
    end the objective writes the folder ``captioner/``: a PEFT adapter (training continues from it with
    ``LoRA(adapter=...)``), or the whole model as a Hugging Face folder with its processor.

    Args:
        max_tokens: Largest number of tokens of a caption, with its end-of-sequence token. A longer caption is cut, and
            then has no end-of-sequence token to learn.
    """

    def __init__(self, max_tokens: int = 512) -> None:
        super().__init__()
        if max_tokens < 1:
            raise ValueError(f"model.init_args.objective.init_args.max_tokens={max_tokens}; allowed: 1 or more")
        self.max_tokens = max_tokens

    def attach(self, umm: UMM) -> None:
        """Make the captioner's weights trainable, as ``finetune`` says.

        Raises:
            ValueError: The run has no ``finetune``.
        """
        if self.finetune is None:
            raise ValueError(
                "model.init_args.finetune=null, but CaptionTuning trains the captioner; allowed: uae.models.finetune.LoRA or "
                "uae.models.finetune.Full; set model.init_args.finetune"
            )
        captioner = hf_captioner(umm, "CaptionTuning")
        self.finetune.attach(captioner.learner, keep_reference=False)
        self.policy, self.processor = captioner.learner.network, captioner.processor

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``loss``: mean cross-entropy over all caption tokens of the batch, in nats per token."""
        return {"loss": self._nats(batch)}

    def _nats(self, batch: ImageBatch) -> Tensor:
        rollout = self.rollout(batch, self.max_tokens)
        logp_BT = self.policy(rollout.context, rollout.tokens_NT, 1, 1.0, (rollout.mask_RS != 0).sum(1))
        return -logp_BT.masked_fill(rollout.mask_RS == 0, 0.0).sum() / rollout.mask_RS.sum()  # banned: -inf at padding

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> dict[str, float]:
        """``nats``: mean cross-entropy of held-out captions, in nats per token."""
        return {"nats": self._nats(batch).item()}

    def save(self, folder: Path) -> None:
        """Write the trained captioner (adapter or whole model) to ``captioner/`` below ``folder``."""
        save_captioner(folder, self.policy, self.processor)
