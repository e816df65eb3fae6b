"""Captions drawn by a separate inference engine, which has a copy of the policy's weights.

The engine replaces `HFCaptioner.sample` and nothing else: log-probs, gradients and checkpoints belong to the captioner. Before
every rollout the weights of the policy are compared with those that the engine got last, tensor by tensor and by content, and
what differs is sent. Then the engine reports a checksum of what it holds. So it does not matter how the weights changed (an
optimizer step, a checkpoint, an adapter that is switched off), and an engine with other weights never samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from uae.learner import Learner, Network
from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.policy import CaptionPolicy, VLMContext
from uae.types import Rollout, Sampling
from uae.weights.low_rank import BASE, check_low_rank

KEY = "model.init_args.system.init_args.reading.engine"
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> integers of that size


@dataclass(frozen=True)
class Request:
    """One row of a rollout.

    Args:
        prompt: Token ids of the prompt as the model reads it: one placeholder for every piece of the image.
        placeholder: Id of the token that stands for a piece of the image.
        image: The image ``[3, H, W]`` in [0, 1].
        seed: Determines the caption, together with prompt, image and weights.
    """

    prompt: list[int]
    placeholder: int
    image: Tensor
    seed: int


@dataclass(frozen=True)
class Completion:
    """What an engine answers to a request.

    Args:
        prompt: Token ids that the model has read, as in `Request`.
        tokens: Token ids of the caption, the end-of-sequence token included.
        logprobs: Log-prob of each token, in nats, of the distribution it was drawn from: without the banned tokens, at the
            temperature of the policy.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


class Engine(Protocol):
    """Draws captions with its own copy of the weights."""

    dtype: torch.dtype  # of its weights

    def wake(self) -> None:
        """Take the memory that the other methods need. Starts the engine at the first call."""
        ...

    def sleep(self) -> None:
        """Release memory until the next `wake`."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights, given by their names in transformers, and forget everything that was computed with the old ones."""
        ...

    def checksum(self) -> int:
        """`checksum` of all weights that the engine holds."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, banned_ids: Sequence[int], end_ids: Sequence[int]
    ) -> list[Completion]:
        """One caption per request. ``banned_ids`` have probability 0, and the first token of ``end_ids`` ends a caption."""
        ...


class EngineCaptioner:
    """An `HFCaptioner` whose captions an engine draws; implements `uae.types.Captioner`.

    Args:
        captioner: Prepares images, computes log-probs and learns.
        engine: Draws captions.
    """

    def __init__(self, captioner: HFCaptioner, engine: Engine) -> None:
        self.captioner, self.engine = captioner, engine
        self._sent: dict[str, int] = {}  # checksums of the weights that the engine has, by name

    @property
    def learner(self) -> Learner[CaptionPolicy]:
        """The learner of the captioner."""
        return self.captioner.learner

    @property
    def processor(self) -> Any:
        """The processor of the captioner."""
        return self.captioner.processor

    @property
    def device(self) -> torch.device:
        """The device that the policy is on."""
        return self.captioner.device

    @property
    def language_model(self) -> nn.Module:
        """The text decoder of the policy, see `HFCaptioner.language_model`."""
        return self.captioner.language_model

    def to(self, device: torch.device | str) -> EngineCaptioner:
        """Move the policy. The engine has a place of its own."""
        self.captioner.to(device)
        return self

    def prompt(self, instruction: str) -> str:
        """The chat-formatted prompt around one image."""
        return self.captioner.prompt(instruction)

    def prepare(self, images_BCHW: Tensor, instruction: str | Sequence[str] | None = None) -> VLMContext:
        """Inputs of the policy, see `HFCaptioner.prepare`."""
        return self.captioner.prepare(images_BCHW, instruction)

    def decode(self, tokens_NT: Tensor, mask_NT: Tensor) -> list[str]:
        """Captions as plain text."""
        return self.captioner.decode(tokens_NT, mask_NT)

    def logprobs(self, rollout: Rollout[VLMContext]) -> Tensor:
        """Log-probs ``[N, T]`` of the policy in training, with gradient."""
        return self.captioner.logprobs(rollout)

    @torch.no_grad()
    def sample(self, context: VLMContext, group: int, sampling: Sampling, seeds: Sequence[int]) -> Rollout[VLMContext]:
        """``group`` captions for every image, drawn by the engine with the current weights of the policy.

        Tokens follow from the weights and from ``seeds[n]``, but they are not those of `HFCaptioner.sample`, which draws in
        another way; greedy captions are. Entropies are unknown, because the engine reports drawn tokens only.

        Raises:
            ValueError: The policy is sharded.
            RuntimeError: The engine has other weights, reads another prompt, or answers what cannot be.
        """
        if isinstance(self.learner.network, FSDPModule):
            raise ValueError(f"{KEY} is set, but trainer.strategy shards the policy; allowed: auto, ddp; or set {KEY} to null")
        requests = _requests(context, group, seeds, self.learner.network.base.config.image_token_id)
        banned_ids, end_ids = self.learner.network.banned_ids.tolist(), self.captioner.end_ids
        with torch.autocast(self.device.type, enabled=False):  # the engine has a precision of its own
            self.engine.wake()
            try:
                self._synchronize()
                completions = self.engine.generate(requests, sampling, banned_ids, end_ids)
            finally:
                self.engine.sleep()
        _check(requests, completions, sampling, {*banned_ids}, {*end_ids})
        return self._rollout(context, completions, group, sampling)

    def _synchronize(self) -> None:
        """Send the weights that changed, and compare all weights of the engine with those of the policy.

        Raises:
            RuntimeError: They differ.
        """
        sums = {name: checksum([weight]) for name, weight in weights(self.learner.network, self.engine.dtype)}
        changed = {name for name, value in sums.items() if self._sent.get(name) != value}
        self._sent = {}  # if sending fails, nothing is known of the engine
        if changed:
            self.engine.load(one for one in weights(self.learner.network, self.engine.dtype) if one[0] in changed)
        if self.engine.checksum() != _wrapped(sum(sums.values())):
            raise RuntimeError(
                f"{KEY}: after {len(changed)} of {len(sums)} weights were sent, the engine has other weights than the policy, so its "
                "captions would be those of another model. Either loading failed, or the engine does not keep all weights of "
                f"{type(self.learner.network.base).__name__}; set {KEY} to null"
            )
        self._sent = sums

    def _rollout(self, context: VLMContext, completions: list[Completion], group: int, sampling: Sampling) -> Rollout[VLMContext]:
        shape = (len(completions), max(len(completion.tokens) for completion in completions))
        tokens_NT = torch.full(shape, self.captioner.pad_id, dtype=torch.long)
        mask_NT, logp_NT = torch.zeros(shape), torch.zeros(shape)
        for n, completion in enumerate(completions):
            length = len(completion.tokens)
            tokens_NT[n, :length] = torch.tensor(completion.tokens)
            logp_NT[n, :length] = torch.tensor(completion.logprobs)
            mask_NT[n, :length] = 1.0
        return Rollout(
            mask_RS=mask_NT.to(self.device),
            logp_RS=logp_NT.to(self.device),
            tokens_NT=tokens_NT.to(self.device),
            texts=self.decode(tokens_NT, mask_NT),
            context=context,
            group=group,
            temperature=sampling.policy_temperature,
        )


def unwrapped(captioner: Any) -> Any:
    """The captioner that an engine draws for, or the captioner itself."""
    return captioner.captioner if isinstance(captioner, EngineCaptioner) else captioner


def weights(network: Network, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What a policy computes with at the moment: its parameters by their names in transformers, an adapter added to them.

    Args:
        network: The policy. Of several adapters the active one counts; one that is switched off does not.
        dtype: The result's, to which sums are rounded once.

    Raises:
        ValueError: The adapter is more than plain LoRA.
    """
    from peft.tuners.lora import LoraLayer

    check_low_rank(name for name, _ in network.base.named_parameters())
    adapted: dict[str, Any] = {
        f"{name}{BASE}weight": layer for name, layer in network.base.named_modules() if isinstance(layer, LoraLayer)
    }
    for name, parameter in network.base.named_parameters():  # a tied one comes once
        if ".lora_" in name:
            continue
        weight, layer = parameter.detach(), adapted.get(name)
        if layer is not None and not layer.disable_adapters:
            for adapter in layer.active_adapters:
                weight = weight.float() + layer.get_delta_weight(adapter).detach().float()
        yield name.replace(BASE, "."), weight.to(dtype)


def checksum(tensors: Iterable[Tensor]) -> int:
    """Sum of all numbers, each read as an integer, modulo 2^64.

    It is exact, and does not change where an engine joins several weights into one, or appends zeros to a weight. Nor does it
    change where weights are exchanged: that shows in the log-probs of the first rollout, see `uae.module.UnifiedGRPO`.
    """
    parts = [tensor.detach().contiguous().view(BITS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return _wrapped(sum(torch.stack(parts).tolist()))


def _wrapped(value: int) -> int:
    return value % 2**64


def _requests(context: VLMContext, group: int, seeds: Sequence[int], placeholder: int) -> list[Request]:
    """One request per row; row n belongs to image n // group."""
    rows = zip(context.rows["input_ids"], context.rows["attention_mask"].bool(), strict=True)
    prompts = [ids[real].tolist() for ids, real in rows]
    return [Request(prompts[n // group], placeholder, context.images[n // group], seed) for n, seed in enumerate(seeds)]


def _check(requests: list[Request], completions: list[Completion], sampling: Sampling, banned: set[int], ends: set[int]) -> None:
    """Refuse answers of another policy than the one that learns, or answers that were cut.

    Raises:
        RuntimeError: There are some.
    """
    if len(completions) != len(requests):
        raise RuntimeError(f"{KEY}: {len(requests)} captions were asked for, the engine gave {len(completions)}")
    for request, one in zip(requests, completions, strict=True):
        if one.prompt != request.prompt:
            raise RuntimeError(
                f"{KEY}: the engine reads a prompt of {len(one.prompt)} tokens where the captioner reads other {len(request.prompt)}: "
                f"it prepares images or questions in another way; set {KEY} to null"
            )
        if not one.tokens or len(one.tokens) != len(one.logprobs) or banned & {*one.tokens} or ends & {*one.tokens[:-1]}:
            raise RuntimeError(f"{KEY}: the engine drew {one.tokens}, of which some are banned or come after the end of a caption")
        if one.tokens[-1] not in ends and len(one.tokens) != sampling.max_tokens:
            raise RuntimeError(
                f"{KEY}: a caption was cut after {len(one.tokens)} tokens, and model.init_args.sampling.max_tokens is "
                f"{sampling.max_tokens}; raise {KEY}.max_model_len, which counts the {len(one.prompt)} tokens of the prompt, too"
            )
