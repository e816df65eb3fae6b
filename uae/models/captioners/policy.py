"""The trainable part of a captioner: a vision-language model that scores captions of images.

The prompt runs once per image, both in sampling and in log-probs, and its key-value cache is expanded to the group. A frozen
image tower runs in sampling only, see `uae.models.captioners.features`. The result and its gradient are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from uae.grpo import LogitRule, OutputLayer, selected_logprobs
from uae.learner import Network
from uae.models.captioners.caches import (
    cache_argument,
    expand,
    has_keys_only,
    library_cache,
    prompt_cache,
    recomputing,
    select,
)
from uae.models.captioners.features import ImageFeatures, kept, looking
from uae.models.captioners.fixed_cache import FixedLayer, continued
from uae.models.captioners.steps import Places, WholeLayer
from uae.models.captioners.trunk import inner, trunk
from uae.models.lengths import alike

FEWEST, SHARE = 8, 0.75  # captions that share a pass, see `uae.models.lengths.alike`


@dataclass(frozen=True)
class VLMContext:
    """The processor's output for B images, padded on the left.

    Args:
        rows: Inputs of the model. Where ``again`` is None, the first dimension of each is B.
        patches: The ``pixel_values`` of each image, for models that say how many patches of all images belong to each; empty
            for other models, whose ``pixel_values`` are in ``rows``.
        images: The B source images ``[3, H, W]`` in [0, 1].
        features: What a frozen image tower sees in them; None if it has to look.
        again: Prepares some of the images anew, given their numbers, and returns what ``rows`` holds; for processors whose
            tensors are not one row per image (tiles, pooling of patches, patches in one long row).
    """

    rows: dict[str, Any]
    patches: tuple[Tensor, ...] = ()
    images: tuple[Tensor, ...] = ()
    features: ImageFeatures | None = None
    again: Callable[[Sequence[int]], dict[str, Any]] | None = None

    def __len__(self) -> int:
        """B, the number of images."""
        return len(self.rows["input_ids"])

    def index(self, images: Sequence[int]) -> VLMContext:
        """The same context for a subset of its images."""
        chosen = [int(image) for image in images]
        if chosen == list(range(len(self))):
            return self
        again = self.again
        rows = {key: value[chosen] for key, value in self.rows.items()} if again is None else again(chosen)
        patches, sources = (tuple(x[i] for i in chosen) if x else () for x in (self.patches, self.images))
        features = None if self.features is None else self.features.index(chosen)
        more = None if again is None else lambda some: again([chosen[i] for i in some])
        return VLMContext(rows, patches, sources, features, more)

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        return {**self.rows, "pixel_values": torch.cat(self.patches)} if self.patches else dict(self.rows)


@dataclass
class Prefix:
    """The state after a prompt has been run, from which captions continue."""

    cache: Any
    hidden_ND: Tensor  # of the last prompt token
    mask_NP: Tensor
    offset_N: Tensor  # position of the first caption token
    features: ImageFeatures | None = None  # of the images in the prompt, if later passes may use them
    places: Places | None = None  # of the cache, if the steps behind the prompt are compiled

    def expand(self, group: int, room: int | None = None, compiled: bool = False) -> Prefix:
        """Repeat every row ``group`` times. The cache is reused, so this object must not be used afterwards.

        Args:
            group: Captions per image.
            room: How many tokens will be fed one by one, without gradient; None if all come in one pass.
            compiled: Whether that is done by compiled steps.
        """
        hidden_ND, mask_NP, offset_N = (x.repeat_interleave(group, 0) for x in (self.hidden_ND, self.mask_NP, self.offset_N))
        if room is None:
            return Prefix(expand(self.cache, len(self.hidden_ND), group), hidden_ND, mask_NP, offset_N)
        places, steps = Places(mask_NP, room) if compiled else None, room
        cache = continued(
            self.cache, len(self.hidden_ND), group, lambda P: FixedLayer(P + steps) if places is None else WholeLayer(places)
        )
        return Prefix(cache, hidden_ND, mask_NP, offset_N, places=places)

    def select(self, prompt_N: Tensor) -> Prefix:
        """The state for N captions that come in one pass; ``prompt_N`` is the number of the prompt of each.

        This object does not change, if its cache holds keys and values only.
        """
        hidden_ND, mask_NP, offset_N = (x[prompt_N] for x in (self.hidden_ND, self.mask_NP, self.offset_N))
        return Prefix(select(self.cache, prompt_N), hidden_ND, mask_NP, offset_N)

    def keep(self, rows_R: Tensor) -> None:
        """Drop all rows but these, of a prefix that was expanded with room for tokens."""
        for layer in self.cache.layers:
            layer.reorder_cache(rows_R)
        self.mask_NP, self.offset_N = self.mask_NP[rows_R], self.offset_N[rows_R]


class CaptionPolicy(Network):
    """A vision-language model together with the tokens that it must never sample.

    Args:
        model: A ``...ForConditionalGeneration``, or a PeftModel around one.
        banned_ids: Ids of tokens whose probability is set to 0.
        gradient_checkpointing: Whether passes with gradient keep only the inputs of layers and compute the rest again. A
            third more computation for a fraction of the memory; results do not change.
    """

    banned_ids: Tensor
    rule = LogitRule()  # how logits follow from the last layer, see `uae.models.captioners.own_forward`
    compile_steps = False  # whether the steps of sampling are compiled, see `uae.models.captioners.steps`

    def __init__(self, model: nn.Module, banned_ids: Sequence[int] = (), gradient_checkpointing: bool = False) -> None:
        super().__init__(model)
        self.gradient_checkpointing = gradient_checkpointing
        self.register_buffer("banned_ids", torch.tensor(list(banned_ids), dtype=torch.long), persistent=False)

    def forward(self, context: VLMContext, tokens_NT: Tensor, group: int, temperature: float, length_N: Tensor) -> Tensor:
        """Teacher-forced log-probs ``[N, T]``, float32, with gradient. Behind the end of a caption they mean nothing.

        Captions of similar length share a pass. With a sharded policy every rank must run the same number of passes, so there all
        captions share one, and at least one caption token is fed, even if no token has to be predicted from it.

        Args:
            context: The prompts.
            tokens_NT: The captions, padded on the right.
            group: Captions of each prompt.
            temperature: Divides the logits.
            length_N: int64, number of tokens of each caption.
        """
        logp, order, T = [], [], tokens_NT.shape[1]
        with self._recomputing() as cache:
            for rows, prefix in self._parts(self.prefill(context, cache), group, length_N):
                longest = int(length_N[rows].max())
                at_RTD = self.advance(prefix, tokens_NT[rows, : max(1, longest - 1)])
                states_RTD = torch.cat([prefix.hidden_ND[:, None], at_RTD], dim=1)[:, :longest]
                logp_RT = self.score(states_RTD, tokens_NT[rows, :longest], temperature)
                logp.append(nn.functional.pad(logp_RT, (0, T - longest)))
                order += rows
        return torch.cat(logp)[torch.tensor(order).argsort()]

    def _parts(self, prompt: Prefix, group: int, length_N: Tensor) -> list[tuple[list[int], Prefix]]:
        """Numbers of captions that share a pass, and the state of their prompts."""
        if isinstance(self, FSDPModule) or not has_keys_only(prompt.cache):
            return [(list(range(len(length_N))), prompt.expand(group))]
        groups = alike(length_N.tolist(), FEWEST, SHARE)
        return [(rows, prompt.select(torch.tensor(rows, device=length_N.device) // group)) for rows in groups]

    def hidden(self, context: VLMContext, tokens_NT: Tensor, group: int) -> Tensor:
        """Final hidden states ``[N, T, D]`` (after the last norm) *at* caption tokens, image and question before them.

        With gradient. Call it on a sharded policy inside `uae.strategy.unsharded` only, because FSDP gathers weights for
        ``forward`` alone.
        """
        with self._recomputing() as cache:
            return self.advance(self.prefill(context, cache).expand(group), tokens_NT)

    @contextmanager
    def _recomputing(self) -> Iterator[Any]:
        """Inside, layers are computed again in the backward pass, if that is asked for; gives a cache that allows it, or None."""
        if not self.gradient_checkpointing or not torch.is_grad_enabled():
            yield None
            return
        with recomputing(self.model):
            yield prompt_cache(self.base)

    def prefill(self, context: VLMContext, cache: Any = None, keep_features: bool = False) -> Prefix:
        """Run the prompt of every image once.

        Args:
            context: The prompts.
            cache: An empty cache; None uses the library's default kind.
            keep_features: Whether the result shall have the features of the images, if its tower is frozen.
        """
        if any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules()):
            raise RuntimeError(
                "gradient_checkpointing_enable() of transformers drops the prompt's cache that captions continue: do not "
                "call it, set model.init_args.system.init_args.reading.gradient_checkpointing to true"
            )
        network, mask_BP = inner(self.base), context.rows["attention_mask"]
        inputs = {name: self._cast(value) for name, value in context.inputs().items()}
        if not hasattr(network, "get_rope_index"):  # else left padding would shift the positions
            inputs["position_ids"] = (mask_BP.cumsum(1) - 1).clamp(min=0)
        cache = library_cache(self.base) if cache is None else cache
        with looking(network, context.features) as seen:
            out = trunk(self.base)(**inputs, **cache_argument(network, cache), use_cache=True)
        offset_B = mask_BP.sum(1)
        deltas = getattr(out, "rope_deltas", None)  # multimodal rope: an image takes fewer positions than tokens
        if deltas is None:  # newer versions keep it on the model
            deltas = getattr(network, "rope_deltas", None)
        if deltas is not None:
            offset_B = offset_B + deltas.view(-1).to(offset_B.device)
        features = context.features
        if keep_features and seen and not self.tower_learns:
            features = kept(seen, inputs["input_ids"], getattr(self.base.config, "image_token_id", None))
        return Prefix(cache, out.last_hidden_state[:, -1], mask_BP, offset_B, features)

    def _cast(self, value: Any) -> Any:
        """Pixels in the dtype of the weights: not every image tower casts them itself."""
        return value.to(self.base.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    @property
    def tower_learns(self) -> bool:
        """Whether weights that learn take part in what the image tower sees, an adapter's included that is switched off."""
        text = {id(p) for part in (self.base.get_decoder(), self.base.get_output_embeddings()) for p in part.parameters()}
        aside = self.used_only_for.get("images")
        return any(
            (parameter.requires_grad or "lora_" in name) and id(parameter) not in text and not (aside and re.search(aside, name))
            for name, parameter in self.named_parameters()
        )

    def advance(self, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
        """Feed caption tokens after a prefix, whose cache grows, and return their final hidden states ``[N, T, D]``."""
        N, T = tokens_NT.shape
        position_NT = prefix.offset_N[:, None] + torch.arange(T, device=tokens_NT.device)
        network = inner(self.base)
        if hasattr(network, "get_rope_index"):
            position_NT = position_NT.expand(3, N, T)
        prefix.offset_N = prefix.offset_N + T
        if prefix.places is not None:
            inputs = {"input_ids": tokens_NT, "position_ids": position_NT.contiguous()}
            return prefix.places.step(network, inputs, prefix.cache)
        prefix.mask_NP = torch.cat([prefix.mask_NP, prefix.mask_NP.new_ones(N, T)], dim=1)
        out = trunk(self.base)(
            input_ids=tokens_NT,
            attention_mask=prefix.mask_NP,
            position_ids=position_NT,
            **cache_argument(network, prefix.cache),
            use_cache=True,
        )
        hidden_NTD: Tensor = out.last_hidden_state
        return hidden_NTD

    def score(self, hidden_NTD: Tensor, tokens_NT: Tensor, temperature: float) -> Tensor:
        """Log-probs ``[N, T]`` of tokens from the hidden states that predict them."""
        head = self.base.get_output_embeddings()
        bias_V = getattr(head, "bias", None)
        return selected_logprobs(hidden_NTD, head.weight, tokens_NT, temperature, banned=self.banned_ids, bias=bias_V, rule=self.rule)

    def output_layer(self, temperature: float) -> OutputLayer:
        """The layer that makes the policy's logits, as `score` computes them: temperature applied, banned tokens at -inf."""
        head = self.base.get_output_embeddings()
        return OutputLayer(head.weight, temperature, self.banned_ids, getattr(head, "bias", None), self.rule)
