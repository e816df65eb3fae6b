"""A miniature system with a memory plan, and its real counterpart."""

import torch

from uae.miniature.tiny import Tiny, create_captioner
from uae.models.captioners.loading import Reading
from uae.models.renderers.diffusers import Rendering
from uae.systems.blueprints import Blueprint
from uae.weights.placement import Placement

PROMPT = 17  # tokens of the miniature's prompt: nine of the image, and the chat around them


class Planned(Tiny):
    """Random networks of Stable Diffusion 3's and Qwen2.5-VL's classes, on the meta device.

    Args:
        offload: The decoder waits on the CPU.
        device: Of the decoder; None is the policy's.
        gradient_checkpointing: In the update.
    """

    def __init__(self, offload: bool = False, device: str | None = None, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.placement, self.recompute = Placement("float32", device, offload), gradient_checkpointing

    def blueprint(self) -> Blueprint:
        from diffusers import AutoencoderKL, SD3Transformer2DModel
        from transformers import Qwen2Config, Qwen2Model

        with torch.device("meta"):
            reader = Qwen2Model(Qwen2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=64))
            decoder = {
                "transformer": SD3Transformer2DModel(num_layers=1, attention_head_dim=8, num_attention_heads=4),
                "vae": AutoencoderKL(latent_channels=16),
            }
            policy = create_captioner(layers=2)
        frozen = {name: (network, self.placement) for name, network in decoder.items()}
        return Blueprint(
            policy,
            {"reader": (reader, Placement("bfloat16")), **frozen},
            Rendering(height=64, width=64, rows=4, placement=self.placement),
            prompt_tokens=PROMPT,
            condition_tokens=32,
            reading=Reading(dtype="float32", gradient_checkpointing=self.recompute),
        )
