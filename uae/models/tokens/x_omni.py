"""X-Omni (arXiv 2507.22058): one language model reads images as tokens, and draws them token by token, at any aspect ratio.

Facts from the official inference code: an image of H x W tokens is written as begin of image, the text ``H W``, a mark, the codes
row after row without line ends, end of image. To draw one, the model goes on after the caption and the first three of these; the
prompt that guidance compares with has no caption. Codes alone are actions here; all other tokens of an image have their fixed place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uae.learner import Learner
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.policy import VLMContext
from uae.models.conditioners.prompts import PLACEHOLDER, check_template, prompt_ids
from uae.models.tokens.conditions import TokenCondition, condition_of
from uae.models.tokens.policy import ImageTokenPolicy, TokenPolicy, TokenSampling
from uae.models.tokens.x_omni_decoder import PixelDecoder
from uae.models.tokens.x_omni_image_tokenizer import ImageTokenizer, Resizing
from uae.seeds import seed_of
from uae.types import Rollout, Trajectory

END = "<|im_end|>"  # of an answer; the official code stops at nothing else


class XOmniPolicy(TokenPolicy):
    """Both token streams of X-Omni's language model. An image token is a code; its id is the code plus the text vocabulary's size.

    Args:
        model: An ``XOmniForCausalLM``, or a PeftModel around one.
        banned_ids: Ids of text tokens whose probability is set to 0.
        gradient_checkpointing: Whether passes with gradient keep only the inputs of layers and compute the rest again.
        grid: Rows and columns of tokens of drawn images.
    """

    fed = "input_ids"

    def __init__(self, model: nn.Module, banned_ids: Sequence[int], gradient_checkpointing: bool, grid: tuple[int, int]) -> None:
        super().__init__(model, banned_ids, gradient_checkpointing)
        self.grid, config = grid, self.base.config
        last = config.num_hidden_layers - config.num_mm_head_layers
        layers = "|".join(map(str, range(last, config.num_hidden_layers)))
        self.used_only_for = {
            "captions": r"\b(lm_head|lm_norm)\.",
            "images": rf"\b(mm_head|mm_norm{f'|layers[.]({layers})' if layers else ''})\.",  # text passes the last layers by
        }

    @property
    def tokens(self) -> int:
        """S, the number of tokens of an image: rows times columns."""
        return self.grid[0] * self.grid[1]

    def image_head(self) -> tuple[Tensor, None]:
        """The rows of the multimodal head that are codes; they have no bias."""
        return self.base.mm_head.weight[: self.base.config.image_vocab_size], None

    def never_adapted(self) -> list[nn.Module]:
        """Both heads, because their weights are read directly, so that an adapter on them would have no effect."""
        return [self.base.mm_head, self.base.lm_head]

    def prompt_inputs(self, ids_NL: Tensor) -> Tensor:
        """The ids themselves: the decoder tells tokens of both vocabularies apart by them."""
        return ids_NL

    def embed_image(self, tokens_NS: Tensor) -> Tensor:
        """The ids of codes."""
        return tokens_NS + self.base.config.vocab_size

    def image_states(self, hidden_NSD: Tensor) -> Tensor:
        """The hidden states themselves, which the multimodal head takes directly."""
        return hidden_NSD


class XOmniProcessor:
    """What a captioner and an export need of a tokenizer.

    Args:
        tokenizer: X-Omni's tokenizer, with a chat template.
        marks: Begin of image, end of image, and the mark between the size of an image and its codes.
    """

    def __init__(self, tokenizer: Any, marks: Sequence[str]) -> None:
        self.tokenizer, self.marks = tokenizer, tuple(marks)
        self.image_token = marks[0]

    @property
    def chat_template(self) -> Any:
        """The tokenizer's chat template."""
        return self.tokenizer.chat_template

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer does."""
        return self.tokenizer.apply_chat_template(*args, **kwargs)

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        """As the tokenizer does."""
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer. The files of the image tokenizer and the pixel decoder, which never train, are not copied."""
        self.tokenizer.save_pretrained(folder)

    def opening(self, grid: tuple[int, int]) -> str:
        """What stands before the codes of an image."""
        begin, _, mark = self.marks
        return f"{begin}{grid[0]} {grid[1]}{mark}"


class XOmniCaptioner(HFCaptioner):
    """A captioner that writes an image as tokens before the prompt is run; after that a prompt is only ids.

    Every image is read alone and at its own aspect ratio, so its tokens do not depend on its batch.

    Args:
        model: An ``XOmniForCausalLM``.
        processor: Its tokenizer.
        vision: The image tokenizer.
        resizing: How images are scaled before they are read.
        instruction: The question put beside every image.
        grid: Rows and columns of tokens of drawn images.
        image_first: Whether the image stands before the question.
    """

    learner: Learner[XOmniPolicy]

    def __init__(
        self,
        model: Any,
        processor: XOmniProcessor,
        vision: ImageTokenizer,
        resizing: Resizing,
        instruction: str,
        grid: tuple[int, int],
        image_first: bool = True,
    ) -> None:
        super().__init__(model, processor, instruction, image_first=image_first)
        self.vision, self.resizing = vision, resizing
        check_ids(processor, model.config)
        tokenizer, size = processor.tokenizer, model.config.vocab_size
        self.end_ids = [tokenizer.convert_tokens_to_ids(END)]
        added = {number for number in tokenizer.added_tokens_decoder if number < size}
        unused = set(range(size)) - set(tokenizer.get_vocab().values())
        banned = sorted((added | unused) - set(self.end_ids))
        policy = XOmniPolicy(model, banned, False, grid)
        policy.rule = self.learner.network.rule
        self.learner = Learner(policy)

    def to(self, device: torch.device | str) -> XOmniCaptioner:
        """Move the policy and the image tokenizer."""
        super().to(device)
        self.vision.to(device)
        return self

    def prepare(self, images_BCHW: Tensor, instruction: str | Sequence[str] | None = None) -> VLMContext:
        """Images ``[B, 3, H, W]`` in [0, 1] (or a list of ``[3, H, W]`` of any sizes) as prompts of text and image tokens.

        Raises:
            ValueError: An image is too small or too narrow.
        """
        prompts = self.prompts(instruction, len(images_BCHW))
        rows = [self._written(prompt, image) for prompt, image in zip(prompts, images_BCHW, strict=True)]
        longest = max(map(len, rows))
        ids_BL = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in rows], device=self.device)
        mask_BL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return VLMContext({"input_ids": ids_BL, "attention_mask": mask_BL}, images=tuple(images_BCHW))

    def _content(self, instruction: str) -> str:
        image = "".join(self.processor.marks[:2])
        return f"{image}\n{instruction}" if self.image_first else f"{instruction}\n{image}"

    @torch.no_grad()
    def _written(self, prompt: str, image_CHW: Tensor) -> list[int]:
        """The ids of a prompt with an image in it."""
        codes_HW = self.vision.encode(self.resizing.pixels(image_CHW)[None])[0]
        opening = self.processor.opening((codes_HW.shape[0], codes_HW.shape[1]))
        before, begin, behind = prompt.partition(self.processor.marks[0])
        assert begin
        head, tail = (self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before + opening, behind))
        return [*head, *(codes_HW.flatten() + self.learner.network.base.config.vocab_size).tolist(), *tail]


@dataclass(frozen=True)
class XOmniCondition(TokenCondition):
    """Prompts, and the captions in them, which the pixel decoder reads, too.

    Args:
        texts: The captions.
    """

    texts: tuple[str, ...]

    def index(self, rows: Sequence[int]) -> XOmniCondition:
        """The condition of some of its rows."""
        some = super().index(rows)
        assert isinstance(some, XOmniCondition)
        return replace(some, texts=tuple(self.texts[row] for row in rows))


class XOmniConditioner:
    """Turns captions into prompts after which X-Omni writes codes; implements `uae.types.Conditioner`.

    Args:
        processor: X-Omni's tokenizer.
        grid: Rows and columns of codes.
        pad_id: Id of the padding token.
        template: Text around the caption; must contain one "{caption}".
        max_tokens: Largest number of tokens of a prompt. A longer caption is cut, with a warning, and counted in
            ``truncated``.
    """

    def __init__(
        self,
        processor: XOmniProcessor,
        grid: tuple[int, int],
        pad_id: int,
        template: str = PLACEHOLDER,
        max_tokens: int = 1024,
    ) -> None:
        check_template(template)
        self.tokenizer, self.pad_id, self.max_tokens, self.truncated = processor.tokenizer, pad_id, max_tokens, 0
        opening = processor.opening(grid)
        self.template = template + opening
        self.negative_L: list[int] = list(self.tokenizer(opening, add_special_tokens=False)["input_ids"])

    def encode(self, texts: list[str], rollout: Rollout[Any] | None = None) -> XOmniCondition:
        """Encode N captions as N prompts beside N copies of the prompt without caption, each padded on its own."""
        rows, cut = prompt_ids(self.tokenizer, self.template, texts, self.max_tokens)
        self.truncated += cut
        return XOmniCondition(**vars(condition_of(rows, self.negative_L, self.pad_id)), texts=tuple(texts))

    def to(self, device: Any) -> XOmniConditioner:
        """Return self; there are no weights to move."""
        return self


@dataclass(frozen=True, kw_only=True)
class XOmniTrajectory(Trajectory[TokenCondition]):
    """Codes, and the seeds of the noise from which the pixel decoder draws them. That noise is no action.

    Args:
        seeds: One seed per row.
    """

    seeds: tuple[int, ...]

    def select(self, rows: list[int]) -> XOmniTrajectory:
        """The trajectories of some rows, in the order given."""
        some: XOmniTrajectory = super().select(rows)
        return replace(some, seeds=tuple(self.seeds[row] for row in rows))


class XOmniImagePolicy(ImageTokenPolicy):
    """Draws codes with an `XOmniPolicy`, and pixels from them with the frozen decoder.

    Args:
        learner: The network that draws, which is also the captioner's.
        vision: The image tokenizer.
        decoder: From features to pixels.
        sampling: How codes are drawn.
        rows: Number of images whose codes are drawn in one batch.
    """

    learner: Learner[XOmniPolicy]

    def __init__(
        self,
        learner: Learner[XOmniPolicy],
        vision: ImageTokenizer,
        decoder: PixelDecoder,
        sampling: TokenSampling = TokenSampling(1.0),  # noqa: B008 (frozen)
        rows: int = 8,
    ) -> None:
        super().__init__(learner, sampling, rows)
        self.vision, self.decoder = vision, decoder

    def to(self, device: torch.device | str) -> XOmniImagePolicy:
        """Move all networks."""
        super().to(device)
        self.vision.to(device)
        self.decoder.to(device)
        return self

    def modules(self) -> list[nn.Module]:
        """The image tokenizer and the networks of the pixel decoder."""
        return [self.vision, *self.decoder.modules()]

    def sample(self, condition: TokenCondition, seeds: Sequence[int]) -> XOmniTrajectory:
        """Draw the codes of one image per row. Its pixels will come from noise that is independent of the codes."""
        drawn = super().sample(condition, seeds)
        return XOmniTrajectory(**vars(drawn), seeds=tuple(seed_of(seed, "pixels") for seed in seeds))

    @torch.no_grad()
    def pixels(self, trajectory: Trajectory[TokenCondition]) -> Tensor:
        """The images ``[N, 3, H, W]``, float32 in [0, 1]."""
        assert isinstance(trajectory, XOmniTrajectory)
        assert isinstance(trajectory.condition, XOmniCondition)
        policy = self.learner.network
        codes_NHW = trajectory.actions_RS.to(policy.banned_ids.device).unflatten(1, policy.grid)
        features = [self.vision.decode(codes_NHW[part.start : part.stop]) for part in self._parts(len(codes_NHW))]
        return self.decoder.decode(torch.cat(features), policy.grid, trajectory.condition.texts, trajectory.seeds)


def check_ids(processor: XOmniProcessor, config: Any) -> None:
    """Check that ids are as the network takes them: codes are numbered from ``vocab_size`` on, marks come behind them.

    Raises:
        ValueError: They are not.
    """
    first, codes = config.vocab_size, config.image_vocab_size
    tokenizer, last = processor.tokenizer, first + config.mm_vocab_size
    found = tokenizer.convert_tokens_to_ids([f"<MM-Token-{code}>" for code in range(codes)])
    marks = tokenizer.convert_tokens_to_ids(list(processor.marks))
    if found != list(range(first, first + codes)) or not all(first + codes <= (mark or 0) < last for mark in marks):
        raise ValueError(
            f"the tokenizer has <MM-Token-0> at {found[0]} and the marks at {marks}, but the network has codes from {first} on and "
            f"marks from {first + codes} to {last - 1}; change model.init_args.system.init_args.checkpoint"
        )
