"""X-Omni's language model in its three roles, without the networks that turn images into tokens and tokens into pixels."""

import torch

from uae.models.tokens import x_omni
from uae.models.tokens.policy import TokenSampling
from uae.models.tokens.x_omni_image_tokenizer import Resizing
from uae.rehearsal.x_omni import MARKS, language_model
from uae.types import UMM


def tiny_x_omni(sampling=TokenSampling(5.0), grid=(4, 5)):  # noqa: B008
    """A system whose images are as many tokens as the grid has places."""
    from uae.models.tokens.x_omni_language_model import XOmniConfig, XOmniForCausalLM

    reader, config, state = language_model(seed=0)
    with torch.device("meta"):
        model = XOmniForCausalLM(XOmniConfig.from_dict(config))
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are in no checkpoint
    processor = x_omni.XOmniProcessor(reader, MARKS)
    captioner = x_omni.XOmniCaptioner(model.eval(), processor, None, Resizing(), "Describe.", grid)
    policy = x_omni.XOmniImagePolicy(captioner.learner, None, None, sampling)
    return UMM(captioner, x_omni.XOmniConditioner(processor, grid, captioner.pad_id), policy)
