"""Whether the text in a picture is still there after the picture was described and drawn again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from uae.encoders.tower import EXACT
from uae.rewards.network import Loaded, NetworkReward, as_bytes, asked, identity, pretrained
from uae.weights.placement import Placement

POOLER = r"encoder\.pooler\."  # of TrOCR's image encoder, which its released checkpoints do not have
INSTRUCTION = "Read all text in this picture. Answer with the text only, and with nothing if there is none."


class TextFidelity(NetworkReward):
    """1 minus the edit distance of what is read in the source and in the reconstruction, relative to the longer text.

    Texts are decoded greedily, runs of white space count as one space, and case counts. Every source is read once, not once
    per caption. The reward is as good as the reader: TrOCR reads one line that fills the picture, and finds letters in
    pictures without any; GOT-OCR 2 and vision-language models read whole pictures.

    Args:
        reader: A folder or hub name of an image-to-text model in the format of transformers. A model with a chat template
            is asked by the ``prompt``; one without (TrOCR, GOT-OCR 2) gets nothing but the picture.
        prompt: Question to a reader that has a chat template.
        max_tokens: Longest text that is read, in tokens; reading stops there.
        textless: What a source without a letter or digit is worth, for all its captions. "one" leaves the other rewards of
            the image alone; "nan" is no reward, so a sum with it is NaN, and the whole image is left out of training.
        placement: See `NetworkReward`.
        rows: See `NetworkReward`.

    Raises:
        ValueError: ``textless`` is unknown.
    """

    def __init__(
        self, reader: str, prompt: str = INSTRUCTION, max_tokens: PositiveInt = 64, textless: Literal["one", "nan"] = "one",
        placement: Placement = EXACT, rows: PositiveInt = 16,
    ) -> None:  # fmt: skip
        super().__init__(placement, rows)
        if textless not in ("one", "nan"):
            raise ValueError(f"textless={textless!r}; allowed: one, nan; set the reward's init_args.textless")
        self.reader, self.prompt, self.max_tokens, self.textless = reader, prompt, max_tokens, textless

    def weights(self) -> Hashable:
        """The folder or hub name."""
        return identity(self.reader)

    def read(self) -> Loaded:
        """Read the model. Its settings of decoding are replaced by greedy ones."""
        import transformers

        loaded = pretrained(transformers.AutoModelForImageTextToText, self.reader, "reader", self.placement, unused=POOLER)
        network: Any = loaded.network
        ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        kept = {name: getattr(network.generation_config, name) for name in ids}
        settings: Any = transformers.GenerationConfig  # has no types
        network.generation_config = settings(do_sample=False, num_beams=1, **kept)
        return loaded

    def scores(self, loaded: Loaded, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Scores ``[N]`` in [0, 1]; NaN for sources without text if ``textless`` is "nan"."""
        source_texts, redrawn_texts = (self.texts(loaded, images) for images in (sources_BCHW, reconstructions_NCHW))
        group = len(redrawn_texts) // len(source_texts)
        return torch.tensor([self._score(source_texts[n // group], text) for n, text in enumerate(redrawn_texts)])

    def texts(self, loaded: Loaded, images_NCHW: Tensor) -> list[str]:
        """What is read in every image."""
        network, processor = loaded.network, loaded.processor
        texts: list[str] = []
        for some in self.batches(len(images_NCHW)):
            images = as_bytes(images_NCHW[some.start : some.stop])
            if getattr(processor, "chat_template", None):
                content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
                inputs = asked(loaded, content, [[image] for image in images], images_NCHW.device)
            else:
                inputs = processor(images=images, return_tensors="pt").to(images_NCHW.device, network.dtype)
            tokens_NT = network.generate(**inputs, max_new_tokens=self.max_tokens)  # type: ignore[operator]
            prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0  # a decoder alone repeats its prompt
            texts += processor.batch_decode(tokens_NT[:, prompt:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _score(self, source: str, redrawn: str) -> float:
        if not any(character.isalnum() for character in source):
            return 1.0 if self.textless == "one" else torch.nan
        return fidelity(source, redrawn)


def fidelity(source: str, redrawn: str) -> float:
    """1 minus the edit distance of two texts relative to the longer one, in [0, 1]; two empty texts agree."""
    return 1 - edit_distance(source, redrawn) / max(len(source), len(redrawn), 1)


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn one text into the other.

    That of torchmetrics looks only near the diagonal, which misses long texts that are shifted.
    """
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]
