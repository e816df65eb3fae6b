"""The miniature with random weights, as a system that a configuration can name: runs need no trained weights."""

import torch

from uae.types import UMM


class RandomTiny:
    """A small captioner and decoder, the same at every build.

    Args:
        captioner_layers: Depth of the captioner.
        denoising_steps: Steps of the renderer.
        spread: Standard deviation of the word embeddings, tied to the head: captions neither uniform nor certain.
    """

    def __init__(self, captioner_layers: int = 1, denoising_steps: int = 2, spread: float = 0.035) -> None:
        self.captioner_layers, self.denoising_steps, self.spread = captioner_layers, denoising_steps, spread

    def build(self) -> UMM:
        from uae.miniature.tiny import INSTRUCTION, create_decoder, processor
        from uae.models.captioners.captioner import HFCaptioner

        with torch.random.fork_rng():
            torch.manual_seed(0)
            captioner = HFCaptioner(self.language_model(), processor(), INSTRUCTION)
            conditioner, renderer = create_decoder(width=32, layers=1, steps=self.denoising_steps)
        captioner.end_ids += range(12, 22)  # random weights rarely end a caption: let these words do so, too
        return UMM(captioner, conditioner.requires_grad_(False).eval(), renderer)

    def language_model(self):
        from uae.miniature.tiny import create_captioner

        torch.manual_seed(0)
        model = create_captioner(layers=self.captioner_layers)
        model.get_input_embeddings().weight.data.normal_(0, self.spread)
        return model.eval()
