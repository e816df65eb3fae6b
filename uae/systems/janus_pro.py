"""Janus-Pro as UMM-2: one language model captions an image and draws it again from the caption, token by token."""

from __future__ import annotations

from typing import Any

from uae.models.captioners.loading import Reading
from uae.models.tokens.policy import LogProb, TokenSampling
from uae.systems.blueprints import Blueprint
from uae.systems.instructions import IN_DETAIL
from uae.types import UMM

KEY = "model.init_args.system.init_args.checkpoint"


class JanusPro:
    """A `uae.types.System` of one Janus or Janus-Pro checkpoint in the layout of transformers.

    Args:
        checkpoint: Folder or hub id, such as deepseek-community/Janus-Pro-1B or -7B. The original deepseek-ai/Janus-Pro-*
            need their authors' package and are refused.
        guidance: Classifier-free guidance scale of image tokens, 1 or more; part of the policy. 1 turns it off and halves
            the work.
        image_temperature: Sampling temperature of image tokens, 0 or more; part of the policy. 0 is greedy.
        cfg_logprob: Which log-probs the policy reports under guidance, see `uae.models.tokens.policy.TokenSampling`.
        rows: Number of images drawn in one batch. It bounds memory and changes nothing else.
        reading: Settings with which the checkpoint is loaded and prompted.
    """

    def __init__(
        self,
        checkpoint: str = "deepseek-community/Janus-Pro-1B",
        guidance: float = 5.0,
        image_temperature: float = 1.0,
        cfg_logprob: LogProb = "guided",
        rows: int = 16,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
    ) -> None:
        self.sampling = TokenSampling(guidance, image_temperature, cfg_logprob)
        self.checkpoint, self.rows, self.reading = checkpoint, rows, reading

    def blueprint(self) -> Blueprint:
        """The network of the system without its weights, for memory plans."""
        from uae.models.tokens.janus import as_buffers
        from uae.systems.blueprints import TokenDrawing, vlm_skeleton

        check_layout(self.checkpoint)
        policy = vlm_skeleton(self.checkpoint, self.reading.dtype)
        as_buffers(policy.model.vqmodel)
        codes, read = policy.config.vq_config, policy.config.vision_config.num_image_tokens
        side = codes.num_patches * 2 ** (len(codes.channel_multiplier) - 1)
        tokens = codes.num_patches**2
        drawing = TokenDrawing(tokens, tokens, codes.num_embeddings, side**2, self.sampling, self.rows)
        return Blueprint(policy, prompt_tokens=read + 128, reading=self.reading, drawing=drawing)

    def build(self) -> UMM:
        """Load the checkpoint on the CPU. It plays all three roles: captioner, conditioner and renderer."""
        from uae.models.captioners.loading import load_captioner, without_engine
        from uae.models.tokens.janus import unify

        check_layout(self.checkpoint)
        without_engine(self.reading, "Janus-Pro")
        captioner = load_captioner(self.checkpoint, self.reading, IN_DETAIL)
        check_spaces(captioner.processor.tokenizer)
        return unify(captioner, self.sampling, self.rows)


def check_layout(checkpoint: str) -> None:
    """Check that a checkpoint is Janus in the layout of transformers.

    Raises:
        ValueError: It is in another layout, or another model.
    """
    from uae.systems.blueprints import config_of

    kind = "multi_modality" if checkpoint.startswith("deepseek-ai/") else config_of(checkpoint).get("model_type")
    if kind == "multi_modality":
        size = "1B" if "1b" in checkpoint.lower() else "7B"
        raise ValueError(
            f"{checkpoint!r} is in the original layout (multi_modality), which needs its authors' package; set {KEY} to the port "
            f"to transformers, deepseek-community/Janus-Pro-{size}"
        )
    if kind != "janus":
        raise ValueError(
            f"{checkpoint!r} is of model_type {kind!r}; allowed: janus, such as deepseek-community/Janus-Pro-1B; change {KEY}"
        )


def check_spaces(tokenizer: Any) -> None:
    """Check that the tokenizer keeps spaces. Some versions of transformers load it as Llama's, which loses them.

    Raises:
        ValueError: The tokenizer loses spaces.
    """
    text = "two red squares"
    back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    if back != text:
        raise ValueError(
            f"the tokenizer reads {text!r} as {back!r}: this transformers ignores tokenizer.json; upgrade it, or set tokenizer_class "
            "to TokenizersBackend in the checkpoint's tokenizer_config.json"
        )
