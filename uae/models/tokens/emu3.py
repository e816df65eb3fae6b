"""Emu3 (arXiv 2409.18869) in transformers' layout: text and pictures in one vocabulary, behind one output head.

Facts from the official inference code and transformers' port of it: a picture of H x W tokens is written as begin of
image, ``H*W``, a wrapper token, H rows of W visual tokens with an end of line behind each, end of frame, end of image.
The prompt of an image is the bare caption before that, guidance compares with a negative prompt in the caption's place.
What is read is written the same way: there is no image tower. Only visual tokens are actions here; all others have
their fixed place, probability one, and no log-prob.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uae.learner import Learner
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.draws import draw, entropy
from uae.models.captioners.policy import VLMContext
from uae.models.conditioners.prompts import PLACEHOLDER, check_template, prompt_ids
from uae.models.tokens.conditions import TokenCondition, condition_of, left_padded, positions
from uae.models.tokens.janus import as_buffers
from uae.models.tokens.policy import ImageTokenPolicy, TokenPolicy, TokenSampling, mixed
from uae.types import UMM, Rollout


def unify(
    captioner: HFCaptioner,
    height: int,
    width: int,
    sampling: TokenSampling = TokenSampling(3.0),  # noqa: B008 (frozen)
    rows: int = 16,
    template: str = PLACEHOLDER,
    negative: str = "",
) -> UMM:
    """Captioner, conditioner and image policy from a captioner around an ``Emu3ForConditionalGeneration``.

    Args:
        captioner: The captioner as it was loaded. Its parts are reused, so it must not be used afterwards.
        height: Height of drawn images in pixels; a multiple of the side of a token (8 pixels).
        width: Width of drawn images in pixels; a multiple of the side of a token (8 pixels).
        sampling: How visual tokens are drawn.
        rows: Number of images that are drawn in one batch.
        template: Text around a caption from which an image is drawn; must contain one "{caption}".
        negative: Negative prompt of classifier-free guidance.
    """
    reader = Emu3Captioner(captioner, height, width)
    conditioner = Emu3Conditioner(reader.processor.tokenizer, reader.learner.network.grid, template, negative)
    return UMM(reader, conditioner, ImageTokenPolicy(reader.learner, sampling, rows))


class Emu3Policy(TokenPolicy):
    """Both token streams of an ``Emu3ForConditionalGeneration``. An image token is an entry of the VQ model's codebook.

    The VQ model stays in its place, but its weights become buffers: no finetuning, optimizer or sharding can find them,
    and an exported model is complete.

    Args:
        model: An ``Emu3ForConditionalGeneration``, or a PeftModel around one.
        banned_ids: Ids of text tokens whose probability is set to 0.
        gradient_checkpointing: Whether passes with gradient keep only the inputs of layers and compute the rest again.
        size: Height and width of drawn images, in pixels.
        moments: Mean and standard deviation that pixels are normalised by, three numbers each (one per color channel).
    """

    def __init__(
        self,
        model: nn.Module,
        banned_ids: Sequence[int],
        gradient_checkpointing: bool,
        size: tuple[int, int],
        moments: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        super().__init__(model, banned_ids, gradient_checkpointing)
        self.first, self.codes = visual_range(self.base)
        self.end_of_line = self.base.vocabulary_mapping.eol_token_id
        self.grid = grid(size, self.vqmodel.spatial_scale_factor)
        mean_1311, std_1311 = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in moments)
        self.register_buffer("mean", mean_1311, persistent=False)
        self.register_buffer("std", std_1311, persistent=False)
        as_buffers(self.vqmodel)
        self.train(self.training)

    @property
    def tokens(self) -> int:
        """S, the number of visual tokens of an image: rows times columns."""
        return self.grid[0] * self.grid[1]

    @property
    def vqmodel(self) -> Any:
        """The VQ model, which turns images into visual tokens and back."""
        return self.base.model.vqmodel

    def image_head(self) -> tuple[Tensor, None]:
        """The rows of the output head that are visual tokens; they have no bias."""
        weight = self.base.get_output_embeddings().weight
        return weight[self.first : self.first + self.codes], None

    def never_adapted(self) -> list[nn.Module]:
        """The output head, because `image_head` reads its weight directly and would miss an adapter on it."""
        return [self.base.get_output_embeddings()]

    def embed_image(self, tokens_NS: Tensor) -> Tensor:
        """Input embeddings ``[N, S + S // W, D]``: an end-of-line token follows every W visual tokens."""
        ids_NS, (_, W) = tokens_NS + self.first, self.grid
        full = ids_NS.shape[1] // W * W
        rows_NRW = ids_NS[:, :full].unflatten(1, (-1, W))
        lines_NP = F.pad(rows_NRW, (0, 1), value=self.end_of_line).flatten(1)
        return self.base.get_input_embeddings()(torch.cat([lines_NP, ids_NS[:, full:]], dim=1))

    def image_states(self, hidden_NSD: Tensor) -> Tensor:
        """The hidden states themselves, which the output head takes directly."""
        return hidden_NSD

    def pixels(self, tokens_NS: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1]: decoded by the VQ model, with the normalisation undone."""
        image_N3HW = self.vqmodel.decode(tokens_NS.unflatten(1, self.grid)).float()
        return (image_N3HW * self.std + self.mean).clamp(0, 1)

    @torch.no_grad()
    def written(self, pixels_CHW: Tensor) -> Tensor:
        """A normalised image as the token ids of its lines, ``[H * (W + 1)]``.

        These are the steps of the VQ model's own ``encode``, which fails here: it reads its dtype from its parameters,
        and they have been turned into buffers.
        """
        vq = self.vqmodel
        frames_1TCHW = pixels_CHW.to(vq.quantize.embedding.weight.dtype).expand(
            1, vq.config.temporal_downsample_factor, *pixels_CHW.shape
        )
        states_1DTHW = vq.quant_conv(vq.encoder(frames_1TCHW).transpose(1, 2))
        codes_HW = vq.quantize(states_1DTHW.transpose(1, 2))[0, 0]
        return F.pad(codes_HW + self.first, (0, 1), value=self.end_of_line).flatten()

    def _states(self, ids_NL: Tensor, mask_NL: Tensor, tokens_NS: Tensor) -> Tensor:
        """The states that predict visual tokens."""
        every_NPD = super()._states(ids_NL, mask_NL, tokens_NS)
        column_P = torch.arange(every_NPD.shape[1], device=every_NPD.device) % (self.grid[1] + 1)
        return every_NPD[:, column_P != self.grid[1]]  # an end of line is fixed, not drawn

    @torch.no_grad()
    def draw(self, condition: TokenCondition, sampling: TokenSampling, uniform_NS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw as in `TokenPolicy.draw`. The last token of a line of the image is fed together with the end-of-line token."""
        guided, uniform_NS = sampling.guidance != 1, uniform_NS.to(self.banned_ids.device)
        ids_ML, mask_ML, uncond_NL, uncond_mask_NL = left_padded(condition, self.banned_ids.device)
        copies, (H, W) = 1 + guided, self.grid
        if guided:
            ids_ML, mask_ML = torch.cat([ids_ML, uncond_NL]), torch.cat([mask_ML, uncond_mask_NL])
        mask_MP = torch.cat([mask_ML, mask_ML.new_ones(len(ids_ML), self.tokens + H - 2)], dim=1)
        position_MP, memory = positions(mask_MP), self._memory(mask_ML, self.tokens + H - 2)
        embeds_MPD, end, layer = self.prompt_inputs(ids_ML), 0, self._image_layer(sampling)
        tokens, logps, entropies = [], [], []
        for step in range(self.tokens):
            start, end = end, end + embeds_MPD.shape[1]
            c_ND, *u_ND = self._fed(embeds_MPD, mask_MP[:, :end], position_MP[:, start:end], memory).chunk(copies)
            logp_NV = layer(mixed(c_ND, u_ND[0] if guided else None, sampling.guidance)).log_softmax(-1)
            token_N = logp_NV.argmax(-1) if sampling.temperature == 0 else draw(logp_NV, uniform_NS[:, step])
            tokens.append(token_N)
            logps.append(logp_NV.gather(1, token_N[:, None])[:, 0])
            entropies.append(entropy(logp_NV))
            row_NS = torch.stack(tokens[step - step % W :], dim=1)
            embeds_MPD = self.embed_image(row_NS)[:, step % W :].repeat(copies, 1, 1)
        return torch.stack(tokens, dim=1), torch.stack(logps, dim=1), torch.stack(entropies, dim=1)

    def train(self, mode: bool = True) -> Emu3Policy:
        """The VQ model stays in eval mode."""
        super().train(mode)
        self.vqmodel.eval()
        return self


class Emu3Captioner(HFCaptioner):
    """A captioner that replaces an image by its visual tokens before the prompt is run; after that a prompt is only text.

    Every image is tokenized alone, so its tokens do not depend on the padding of its batch, and the VQ model runs once per
    image instead of once per pass.

    Args:
        captioner: A captioner around an ``Emu3ForConditionalGeneration``, as it was loaded.
        height, width: Height and width of drawn images, in pixels.
    """

    learner: Learner[Emu3Policy]

    def __init__(self, captioner: HFCaptioner, height: int, width: int) -> None:
        model: Any = captioner.learner.network.model
        processor = captioner.processor
        images, (first, codes) = processor.image_processor, visual_range(model)
        marks = {i for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
        pictures = {model.vocabulary_mapping.eol_token_id, *range(first, first + codes)}
        banned = sorted((marks | pictures) - set(captioner.end_ids))
        super().__init__(model, processor, captioner.instruction, banned, captioner.image_first)
        banned, recompute = self.learner.network.banned_ids.tolist(), captioner.learner.network.gradient_checkpointing
        moments = (images.image_mean, images.image_std) if images.do_normalize else ([0.0] * 3, [1.0] * 3)
        policy = Emu3Policy(model, banned, recompute, (height, width), moments)
        policy.compile_steps, policy.rule = captioner.learner.network.compile_steps, captioner.learner.network.rule
        self.learner = Learner(policy.to(captioner.device))

    def prepare(self, images_BCHW: Tensor, instruction: str | Sequence[str] | None = None) -> VLMContext:
        """Prepare as in `HFCaptioner.prepare`. Emu3's processor pads images to the largest one; the padding is cut off."""
        images = [(image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy() for image in images_BCHW]
        prompts = self.prompts(instruction, len(images))
        given = self.processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
        given = given.to(self.device)
        ids_BL, sizes = given["input_ids"], given["image_sizes"].tolist()
        for ids_L, pixels_CHW, (height, width) in zip(ids_BL, given["pixel_values"], sizes, strict=True):
            ids_L[ids_L == self.processor.image_token_id] = self.learner.network.written(pixels_CHW[:, :height, :width])
        rows = {"input_ids": ids_BL, "attention_mask": given["attention_mask"]}
        return VLMContext(rows, images=tuple(images_BCHW))


class Emu3Conditioner:
    """Turns captions into prompts after which Emu3 writes visual tokens; implements `uae.types.Conditioner`.

    Args:
        tokenizer: Emu3's tokenizer, with ``boi_token``, ``image_wrapper_token`` and a padding token.
        grid: Rows and columns of visual tokens.
        template: Text around the caption; must contain one "{caption}".
        negative: Negative prompt of classifier-free guidance.
        max_tokens: Largest number of tokens of a prompt. A longer caption is cut, with a warning, and counted in
            ``truncated``.
    """

    def __init__(
        self,
        tokenizer: Any,
        grid: tuple[int, int],
        template: str = PLACEHOLDER,
        negative: str = "",
        max_tokens: int = 1024,
    ) -> None:
        check_template(template)
        self.tokenizer, self.max_tokens, self.truncated = tokenizer, max_tokens, 0
        opening = f"{tokenizer.boi_token}{grid[0]}*{grid[1]}{tokenizer.image_wrapper_token}"
        self.template = f"{tokenizer.bos_token}{template}{opening}"
        self.negative_L = tokenizer(f"{tokenizer.bos_token}{negative}{opening}", add_special_tokens=False)["input_ids"]

    def encode(self, texts: list[str], rollout: Rollout | None = None) -> TokenCondition:
        """Encode N captions as N prompts beside N copies of the negative prompt, each padded on its own."""
        rows, cut = prompt_ids(self.tokenizer, self.template, texts, self.max_tokens)
        self.truncated += cut
        return condition_of(rows, self.negative_L, self.tokenizer.pad_token_id)

    def to(self, device: Any) -> Emu3Conditioner:
        """Return self; there are no weights to move."""
        return self


def visual_range(model: Any) -> tuple[int, int]:
    """The id of the first visual token, and the number of visual tokens.

    Raises:
        ValueError: The ids of visual tokens are not consecutive in the order of the codebook.
    """
    ids = [model.vocabulary_mapping.img2bpe[code] for code in range(model.config.vq_config.codebook_size)]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError("the vocabulary_map of the checkpoint's config scatters the visual tokens; allowed: one block")
    return ids[0], len(ids)


def grid(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Rows and columns of tokens of an image.

    Args:
        size: Height and width of the image in pixels.
        side: Side of a token in pixels.

    Raises:
        ValueError: Height or width is no multiple of ``side``.
    """
    for key, pixels in zip(("height", "width"), size, strict=True):
        if pixels < side or pixels % side:
            key = f"model.init_args.system.init_args.{key}"
            raise ValueError(f"{key}={pixels}; allowed: multiples of {side}; change {key}")
    return size[0] // side, size[1] // side
