"""Any captioner of this project as a model of lmms-eval, which imports this module (`uae.bench.understanding.lmms_eval_plugin`).

lmms-eval --model uae --model_args config=configs/uae.yaml,ckpt_path=FILE --tasks mmmu_val --log_samples --output_path DIR
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from uae.bench.system import load
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.engine import unwrapped
from uae.types import Sampling

LONGEST = 1024  # most tokens of an answer if the task sets no limit
PLACEHOLDER = "<image>"  # lmms-eval writes it into questions; the chat template adds its own


class TrainedCaptioner(lmms):
    """Answers questions about an image greedily, with the question as the captioner's instruction.

    Args:
        config: Configuration file of a complete run, as for ``uae.cli predict``; several files are joined by "+".
        ckpt_path: Checkpoint whose weights answer; None takes the weights that the configuration names (an export, for instance).
        batch_size: Number of questions answered at once.
        device: Name of the device; None is the first GPU, or the CPU if there is none.
        several_images: "refuse" raises for a question about several images; "join" puts its images side by side, scaled to
            equal height. The captioners read one image per question.
        max_batch_size: Ignored; lmms-eval passes it to every model.
        **settings: Other keys of the configuration, as for ``uae.cli predict``.

    Raises:
        ValueError: An argument is not allowed, or lmms-eval was started on several processes.
    """

    def __init__(
        self,
        config: str,
        ckpt_path: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        several_images: Literal["refuse", "join"] = "refuse",
        max_batch_size: int | None = None,
        **settings: object,
    ) -> None:
        super().__init__()
        if several_images not in ("refuse", "join"):
            raise ValueError(f"several_images={several_images!r} in --model_args; allowed: refuse, join")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}; allowed: 1 or more")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("the captioner answers in one process; start lmms-eval without a launcher")
        words = [word for file in config.split("+") for word in ("--config", file)]
        words += ["--ckpt_path", ckpt_path] if ckpt_path else []
        words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        self.loaded = load(words, device)
        self.captioner: Any = self.loaded.umm.captioner  # HFCaptioner also reads lists, which the protocol does not declare
        self.batch_size, self.several_images = int(batch_size), several_images

    @property
    def device(self) -> torch.device:
        """Device of the captioner."""
        return self.loaded.device

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer per request, in their order.

        Args:
            requests: lmms-eval's requests, whose ``args`` are (question, generation settings, function from a row of the data set
                to its images, number of the row, task, split).
        """
        answers: list[str] = []
        with tqdm(total=len(requests), desc="answering", unit="question") as bar:
            while len(answers) < len(requests):
                some = self._alike(requests[len(answers) :])
                found = self._answer(some)
                for request, answer in zip(some, found, strict=True):
                    self.cache_hook.add_partial("generate_until", request.args[:2], answer)
                answers += found
                bar.update(len(found))
        return answers

    def _alike(self, requests: Sequence[Any]) -> list[Any]:
        """The next requests that go into one batch, which have equal generation settings."""
        captioner = type(unwrapped(self.captioner))  # a captioner with its own ``prepare`` takes one question for all images
        one_question_per_image = issubclass(captioner, HFCaptioner) and captioner.prepare is HFCaptioner.prepare
        size = self.batch_size if one_question_per_image else 1
        first, some = requests[0].args[1], []
        for request in requests[:size]:
            if request.args[1] != first:
                break
            some.append(request)
        return some

    def _answer(self, requests: Sequence[Any]) -> list[str]:
        settings = dict(requests[0].args[1])
        if settings.get("do_sample") or settings.get("temperature"):
            raise ValueError("the captioner answers greedily; set temperature=0,do_sample=false in --gen_kwargs")
        images = [self._image(*request.args[2:6]) for request in requests]
        questions = [request.args[0].replace(PLACEHOLDER, "").strip() for request in requests]
        sampling = Sampling(temperature=0.0, max_tokens=int(settings.get("max_new_tokens", LONGEST)))
        with self.loaded.precision():
            asked = questions if len(questions) > 1 else questions[0]
            rollout = self.captioner.sample(self.captioner.prepare(images, asked), 1, sampling, [0] * len(images))
        return [_until(text, settings.get("until") or []) for text in rollout.texts]

    def _image(self, doc_to_visual: Callable[[Any], Any], doc_id: int, task: str, split: str) -> Tensor:
        """The image of a question, float ``[3, H, W]`` in [0, 1].

        Raises:
            ValueError: The question has no image, or several that may not be joined.
        """
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        pictures = [visuals] if isinstance(visuals, Image.Image) else list(visuals or [])
        if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
            raise ValueError(f"question {doc_id} of {task} has no image, or has something else; the captioner reads images only")
        if len(pictures) > 1 and self.several_images == "refuse":
            raise ValueError(
                f"question {doc_id} of {task} has {len(pictures)} images, the captioner reads one: add several_images=join to "
                "--model_args to put them side by side, and say so with the result"
            )
        return pil_to_tensor(side_by_side([picture.convert("RGB") for picture in pictures])).float() / 255

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse tasks that compare the likelihoods of given answers; MMMU and MMT-Bench are answered in words."""
        raise NotImplementedError("the captioner answers in words (generate_until); choose other tasks")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse conversations: the captioner does not read earlier questions."""
        raise NotImplementedError("the captioner answers single questions (generate_until); choose other tasks")


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Join pictures in a row from the left, all scaled to the height of the highest."""
    if len(pictures) == 1:
        return pictures[0]
    height = max(picture.height for picture in pictures)
    scaled = [picture.resize((max(1, round(picture.width * height / picture.height)), height)) for picture in pictures]
    row = Image.new("RGB", (sum(picture.width for picture in scaled), height), "white")
    left = 0
    for picture in scaled:
        row.paste(picture, (left, 0))
        left += picture.width
    return row


def _until(text: str, ends: str | Sequence[str]) -> str:
    """The text up to the first of some end marks."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text.strip()
