"""A vision-language model as the judge of a reconstruction."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from uae.encoders.tower import EXACT
from uae.rewards.network import Loaded, NetworkReward, as_bytes, asked, identity, pretrained
from uae.weights.placement import Placement

QUESTION = "Do both pictures show the same objects, with the same number, colors, sizes, positions and texts? Answer Yes or No."


class VLMJudge(NetworkReward):
    """How probable a vision-language model thinks "Yes" is as its answer to a question about source and reconstruction.

    Both pictures stand in one prompt, the source first. The score is P(yes) / (P(yes) + P(no)) of the next token. A judge
    knows objects, numbers and relations, and can be asked for what matters; but it has opinions of its own, prefers some
    answers whatever it sees, and a policy may learn to please it. Equal pictures need not score 1: look at their score before
    training. The judge must not be the captioner that trains, nor of its family.

    Args:
        judge: A folder or hub name of a vision-language model with a chat template, in the format of transformers. It must
            have learned from prompts with several images.
        question: What the judge is asked after both pictures.
        positive: Word of the good answer, in quotes in YAML; its first token counts.
        negative: Word of the bad answer; its first token must be another one.
        placement: See `NetworkReward`.
        rows: Most pairs of images that the judge gets at once.
    """

    def __init__(
        self, judge: str, question: str = QUESTION, positive: str = "Yes", negative: str = "No", placement: Placement = EXACT,
        rows: PositiveInt = 16,
    ) -> None:  # fmt: skip
        super().__init__(placement, rows)
        self.judge, self.question, self.answers = judge, question, (positive, negative)

    def weights(self) -> Hashable:
        """The folder or hub name."""
        return identity(self.judge)

    def read(self) -> Loaded:
        """Read the model and its processor.

        Raises:
            ValueError: The model cannot be read, or its processor has no chat template.
        """
        import transformers

        loaded = pretrained(transformers.AutoModelForImageTextToText, self.judge, "judge", self.placement)
        if not getattr(loaded.processor, "chat_template", None):
            raise ValueError(
                f"judge {self.judge!r} ({type(loaded.network).__name__}) has no chat template, so it cannot be asked; set the "
                "reward's init_args.judge to a vision-language model that has one"
            )
        return loaded

    def scores(self, loaded: Loaded, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Probabilities ``[N]`` in [0, 1].

        Raises:
            ValueError: The two answers begin with the same token, so the judge's choice cannot be told.
        """
        yes, no = self._tokens(loaded)
        sources, redrawn = as_bytes(sources_BCHW), as_bytes(reconstructions_NCHW)
        group = len(redrawn) // len(sources)
        image = {"type": "image"}
        content = [_said("First picture:"), image, _said("Second picture:"), image, _said(self.question)]
        scores = []
        for some in self.batches(len(redrawn)):
            pairs = [[sources[row // group], redrawn[row]] for row in some]
            inputs = asked(loaded, content, pairs, reconstructions_NCHW.device)
            logits_NV = loaded.network(**inputs, logits_to_keep=1).logits[:, -1].float()
            scores.append((logits_NV[:, yes] - logits_NV[:, no]).sigmoid())
        return torch.cat(scores)

    def _tokens(self, loaded: Loaded) -> tuple[int, int]:
        tokenizer: Any = loaded.processor.tokenizer
        yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][:1] for word in self.answers)
        if not yes or not no or yes == no:
            raise ValueError(
                f"the answers {self.answers[0]!r} and {self.answers[1]!r} begin with the same token of judge {self.judge!r}, or "
                "with none; set the reward's init_args.positive and init_args.negative to words with different beginnings"
            )
        return yes[0], no[0]


def _said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
