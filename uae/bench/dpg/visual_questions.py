"""Yes-or-no questions about images, answered by a model of transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from uae.bench.fingerprints import weights_digest
from uae.files.locations import locate

MODEL = "Salesforce/blip-vqa-base"
INSTRUCTION = "Answer with yes or no only."  # follows every question to a chat model


class Answerer(Protocol):
    """Answers questions about an image."""

    backend: dict[str, str | None]  # description of the model in results

    def __call__(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """One answer per question, as "yes" or "no"."""
        ...


class TransformersAnswerer:
    """BLIP for visual question answering, or any vision-language model with a chat template.

    DPG-Bench was published with mPLUG-large, which needs other versions of its libraries; scores of different models are not
    comparable.

    Args:
        path: A folder, a folder below ``UAE_CHECKPOINTS`` or a model id on the hub.
        device: Device of the model.
        batch_size: Number of questions answered at once.
        max_tokens: Most tokens of an answer.

    Raises:
        FileNotFoundError: The model cannot be found.
        ValueError: The model is neither BLIP nor has a chat template.
    """

    def __init__(self, path: str = MODEL, device: str | torch.device = "cpu", batch_size: int = 8, max_tokens: int = 8) -> None:
        import transformers

        place = locate(path)
        local = os.path.isdir(place)
        self.device, self.batch_size, self.max_tokens = torch.device(device), batch_size, max_tokens
        try:
            kind = transformers.AutoConfig.from_pretrained(place, local_files_only=local, trust_remote_code=False).model_type
            self.processor: Any = transformers.AutoProcessor.from_pretrained(place, local_files_only=local, trust_remote_code=False)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(f"no model {path!r} here or on the hub ({reason}); set --vqa") from error
        self.chats = kind != "blip"
        if self.chats and not getattr(self.processor, "chat_template", None):
            raise ValueError(f"--vqa {path!r} ({kind}) is neither BLIP nor has it a chat template; allowed: one of them")
        loader = transformers.AutoModelForImageTextToText if self.chats else transformers.BlipForQuestionAnswering
        model = loader.from_pretrained(place, dtype="auto", local_files_only=local, trust_remote_code=False)
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        if self.chats:
            self.processor.tokenizer.padding_side = "left"
        self.backend: dict[str, str | None] = {
            "name": "hf",
            "vqa": path,
            "vqa_sha256": weights_digest(self.model),
            "instruction": INSTRUCTION if self.chats else None,
        }

    @torch.inference_mode()
    def __call__(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """One greedy answer per question, in lower case and without a full stop."""
        answers = [""] * len(questions)
        for places in self._batches(questions):
            some = [questions[place] for place in places]
            inputs = (self._chat if self.chats else self._plain)(image, some).to(self.device, self.model.dtype)
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
            if self.chats:
                tokens = tokens[:, inputs["input_ids"].shape[1] :]
            for place, answer in zip(places, self.processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
                answers[place] = answer.strip().lower().rstrip(".")
        return answers

    def _batches(self, questions: Sequence[str]) -> list[list[int]]:
        """Positions of the questions of each batch. BLIP's decoder reads padding, so its batches hold questions of equal length."""
        groups: dict[int, list[int]] = {}
        for place, text in enumerate(questions):
            length = 0 if self.chats else len(self.processor.tokenizer(text)["input_ids"])
            groups.setdefault(length, []).append(place)
        size = self.batch_size
        return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

    def _plain(self, image: Image.Image, questions: list[str]) -> Any:
        return self.processor(images=[image] * len(questions), text=questions, return_tensors="pt")

    def _chat(self, image: Image.Image, questions: list[str]) -> Any:
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": f"{text} {INSTRUCTION}"}]}]
            for text in questions
        ]
        return self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
