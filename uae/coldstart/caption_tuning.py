"""Supervised fine-tuning of any captioner on the captions of a data set."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from uae.coldstart.system_objective import CAPTIONER, SystemObjective, hf_captioner, save_network
from uae.types import UMM, ImageBatch


class CaptionTuning(SystemObjective):
    """Cross-entropy of captions under the captioner (arXiv 2509.09666: the cold start of the encoder).

    What trains is the run's own ``finetune``, `uae.models.finetune.LoRA` or ``Full``. Written at the end: ``captioner/``,
    a PEFT adapter (``LoRA(adapter=...)`` continues it) or a Hugging Face folder with its processor.

    Args:
        max_tokens: Longest caption, its end included; the rest is cut, and then its end is not taught.
    """

    def __init__(self, max_tokens: int = 512) -> None:
        super().__init__()
        if max_tokens < 1:
            raise ValueError(f"model.init_args.objective.init_args.max_tokens={max_tokens}; allowed: 1 or more")
        self.max_tokens = max_tokens

    def attach(self, umm: UMM) -> None:
        """The captioner's trainables."""
        if self.finetune is None:
            raise ValueError("CaptionTuning needs to know what trains, and model.init_args.finetune is null: set it")
        captioner = hf_captioner(umm, "CaptionTuning")
        self.finetune.attach(captioner.learner, keep_reference=False)
        self.policy, self.processor = captioner.learner.network, captioner.processor

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``loss``: nats per token, the mean over the batch's tokens."""
        return {"loss": self._nats(batch)}

    def _nats(self, batch: ImageBatch) -> Tensor:
        rollout = self.rollout(batch, self.max_tokens)
        logp_BT = self.policy(rollout.context, rollout.tokens_NT, 1, 1.0)
        return -logp_BT.masked_fill(rollout.mask_RS == 0, 0.0).sum() / rollout.mask_RS.sum()  # padding is banned: -inf

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> dict[str, float]:
        """``nats`` per token of held-out captions."""
        return {"nats": self._nats(batch).item()}

    def save(self, folder: Path) -> None:
        """Write ``captioner/``."""
        save_network(folder / CAPTIONER, self.policy.model)
        if not self.policy.adapted:
            self.processor.save_pretrained(folder / CAPTIONER)
