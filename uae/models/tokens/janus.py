r"""Janus and Janus-Pro (arXiv 2410.13848, 2501.17811) in transformers' layout: captioner and image policy on one root.

Facts from the official inference code: the prompt of an image is ``<|User|>: {caption}\n\n<|Assistant|>:`` and the
begin-of-image token; the prompt without caption has the same length, everything but its first and last token is padding,
and that padding is attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from uae.learner import Learner
from uae.models.captioners.captioner import HFCaptioner
from uae.models.conditioners.prompts import PLACEHOLDER, check_template, prompt_ids
from uae.models.conditioners.states import right_padded
from uae.models.tokens.conditions import TokenCondition
from uae.models.tokens.policy import ImageTokenPolicy, TokenPolicy, TokenSampling
from uae.types import UMM, Rollout

TEMPLATE = f"<|User|>: {PLACEHOLDER}\n\n<|Assistant|>:"


def unify(
    captioner: HFCaptioner,
    sampling: TokenSampling = TokenSampling(),  # noqa: B008 (frozen)
    rows: int = 16,
    template: str = TEMPLATE,
) -> UMM:
    """Captioner, conditioner and image policy from a captioner around a ``JanusForConditionalGeneration``.

    The captioner is changed: its network becomes a `JanusPolicy`, and it never samples a token that begins or ends an image.

    Args:
        captioner: The captioner as it was loaded, without an adapter.
        sampling: How image tokens are drawn.
        rows: Number of images that are drawn in one batch.
        template: Text around a caption from which an image is drawn; must contain one "{caption}".
    """
    tokenizer = captioner.processor.tokenizer
    marks = tokenizer.convert_tokens_to_ids([tokenizer.image_token, tokenizer.boi_token, tokenizer.eoi_token])
    banned = sorted({*captioner.learner.network.banned_ids.tolist(), *marks})
    policy = captioner.learner.network
    learner = Learner(JanusPolicy(policy.model, banned, policy.gradient_checkpointing).to(captioner.device))
    learner.network.compile_steps, learner.network.rule = policy.compile_steps, policy.rule
    captioner.learner = learner
    return UMM(captioner, TokenConditioner(tokenizer, template), ImageTokenPolicy(learner, sampling, rows))


class JanusPolicy(TokenPolicy):
    """Both token streams of a ``JanusForConditionalGeneration``.

    The image tokenizer (VQ model) stays in its place, but its weights become buffers: no finetuning, optimizer or
    sharding can find them, and an exported model is complete.

    Args:
        model: A ``JanusForConditionalGeneration``, or a PeftModel around one.
        banned_ids: Ids of text tokens whose probability is set to 0.
        gradient_checkpointing: Whether passes with gradient keep only the inputs of layers and compute the rest again.
    """

    used_only_for = MappingProxyType(
        {
            "captions": r"\b(vision_model|aligner|lm_head)\.",
            "images": r"\bgeneration_(embeddings|aligner|head)\.",
        }
    )

    def __init__(self, model: nn.Module, banned_ids: Sequence[int] = (), gradient_checkpointing: bool = False) -> None:
        super().__init__(model, banned_ids, gradient_checkpointing)
        as_buffers(self.base.model.vqmodel)
        self.train(self.training)

    @property
    def tokens(self) -> int:
        """S, the number of tokens of an image; 576 for images of 384 x 384 pixels."""
        return self.base.config.vq_config.num_patches**2

    def image_head(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[V, D]`` and bias ``[V]`` of the last layer of the generation head."""
        head = self.base.model.generation_head.vision_head
        return head.weight, head.bias

    def never_adapted(self) -> list[nn.Module]:
        """The last layer of the generation head, because `image_head` reads its weight directly and would miss an adapter."""
        return [self.base.model.generation_head.vision_head]

    def embed_image(self, tokens_NS: Tensor) -> Tensor:
        """Input embeddings ``[N, S, D]``: Janus has a separate table for image tokens, followed by an aligner."""
        return self.base.prepare_embeddings_for_image_generation(tokens_NS)

    def image_states(self, hidden_NSD: Tensor) -> Tensor:
        """The output of the generation head before its last layer."""
        head = self.base.model.generation_head
        return head.activation_fn(head.proj_out(hidden_NSD))

    def pixels(self, tokens_NS: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1]; the VQ model decodes to the range -1 to 1."""
        image_NHWC = self.base.decode_image_tokens(tokens_NS)
        return (image_NHWC.permute(0, 3, 1, 2).float() * 0.5 + 0.5).clamp(0, 1)

    def train(self, mode: bool = True) -> JanusPolicy:
        """The VQ model stays in eval mode."""
        super().train(mode)
        self.base.model.vqmodel.eval()
        return self


def as_buffers(module: nn.Module) -> None:
    """Turn the parameters of a frozen network into buffers of the same names."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, weight.detach())


class TokenConditioner:
    """Turns captions into prompts after which Janus writes image tokens; implements `uae.types.Conditioner`.

    Args:
        tokenizer: Janus's tokenizer, with ``boi_token``.
        template: Text around the caption; must contain one "{caption}".
        max_tokens: Largest number of tokens of a prompt. A longer caption is cut, with a warning, and counted in
            ``truncated``.
    """

    def __init__(self, tokenizer: Any, template: str = TEMPLATE, max_tokens: int = 1024) -> None:
        check_template(template)
        self.tokenizer, self.max_tokens, self.truncated = tokenizer, max_tokens, 0
        self.template = f"{tokenizer.bos_token or ''}{template}{tokenizer.boi_token}"
        self.pad_id = tokenizer.convert_tokens_to_ids(tokenizer.pad_token or tokenizer.eos_token)

    def encode(self, texts: list[str], rollout: Rollout | None = None) -> TokenCondition:
        """Encode N captions as N prompts padded on the right, with and without the caption.

        The result for a row does not depend on its padding.
        """
        rows, cut = prompt_ids(self.tokenizer, self.template, texts, self.max_tokens)
        self.truncated += cut
        ids_NL, mask_NL = right_padded(rows, self.tokenizer, "cpu")
        last_N1 = mask_NL.sum(1, keepdim=True) - 1
        at_L = torch.arange(ids_NL.shape[1])
        kept_NL = (at_L == 0) | (at_L == last_N1)  # begin-of-sentence and begin-of-image tokens
        return TokenCondition(ids_NL, mask_NL, ids_NL.masked_fill(~kept_NL, self.pad_id), mask_NL)

    def to(self, device: Any) -> TokenConditioner:
        """Return self; there are no weights to move."""
        return self
