"""vLLM in the training process, as an engine that draws captions. Not yet run on a GPU: docs/real_systems.md says what is tested."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from packaging.version import Version
from torch import Tensor, distributed

from uae.models.captioners.captioner import HFCaptioner
from uae.models.captioners.engine import KEY, Completion, Request, checksum
from uae.types import Sampling

OLDEST = "0.33"  # the first whose dependencies were compared with ours
LOGPROBS = "processed_logprobs"  # after temperature and bans, of what tokens are drawn from


@dataclass(frozen=True)
class VLLM:
    """Settings of vLLM. Every process has an engine of its own, on its own GPU.

    Args:
        gpu_memory_utilization: Share of the GPU's memory for weights and caches of the engine while it draws, in (0, 1).
        max_model_len: Most tokens of prompt and caption together; None is the model's own limit, for which the caches are
            usually too small.
        max_num_seqs: Most captions that are drawn at a time; None is vLLM's default.
        enforce_eager: Whether vLLM records no CUDA graphs: a faster start, less memory, slower drawing.
        dtype: Dtype of the engine's weights. An adapter's sum with them is rounded to it.
        sleep: Whether the engine moves its weights to the CPU's memory and frees its caches while it does not draw.
    """

    gpu_memory_utilization: float = 0.3
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    enforce_eager: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    sleep: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        if not 0 < self.gpu_memory_utilization < 1:
            raise ValueError(f"{KEY}.gpu_memory_utilization={self.gpu_memory_utilization}; allowed: between 0 and 1")
        for name in ("max_model_len", "max_num_seqs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{KEY}.{name}={value}; allowed: 1 or more, or null")


class VLLMEngine:
    """Implements `uae.models.captioners.engine.Engine`.

    The engine starts at the first `wake`, from the captioner's architecture and processor with random weights, so that it can
    only ever have the weights that were sent.

    Args:
        captioner: Whose captions are drawn. Only its architecture and its processor are read.
        settings: Settings of vLLM.

    Raises:
        ValueError: vLLM is missing or too old, or there is no GPU.
    """

    def __init__(self, captioner: HFCaptioner, settings: VLLM) -> None:
        self._vllm = _library()
        self.captioner, self.settings = captioner, settings
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self._llm: Any = None
        self._asleep = False

    def wake(self) -> None:
        """Start the engine, or give it its memory back."""
        if self._llm is None:
            self._start()
        elif self._asleep:
            torch.cuda.empty_cache()  # what PyTorch keeps for itself, the engine could not have
            self._llm.wake_up()
            self._asleep = False

    def sleep(self) -> None:
        """Move the weights to the CPU's memory, and free the caches."""
        if self.settings.sleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights, and forget keys, values and image features that were computed with the old ones.

        Raises:
            RuntimeError: They could not be forgotten.
        """
        self._llm.apply_model(lambda model: model.load_weights(weights))
        self._llm.llm_engine.reset_encoder_cache()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(f"{KEY}: vLLM keeps keys and values that were computed with older weights")

    def checksum(self) -> int:
        """Checksum of all parameters, in the dtype that they were sent in."""
        (found,) = self._llm.apply_model(lambda model: checksum(p.to(self.dtype) for p in model.parameters()))
        return int(found)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, banned_ids: Sequence[int], end_ids: Sequence[int]
    ) -> list[Completion]:
        """One caption per request; vLLM shares the work for equal prompts and images.

        Raises:
            ValueError: vLLM would draw at another temperature.
        """
        if sampling.temperature and not 0.01 <= sampling.temperature <= 2:
            raise ValueError(f"model.init_args.sampling.temperature={sampling.temperature}; allowed with {KEY}: 0, or from 0.01 to 2")
        parameters = [
            self._vllm.SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                seed=request.seed,
                logprobs=0,  # of the drawn token alone
                logit_bias=dict.fromkeys(banned_ids, float("-inf")),
                stop_token_ids=list(end_ids),
                ignore_eos=True,  # `end_ids` alone count
                detokenize=False,
            )
            for request in requests
        ]
        images = {id(request.image): _picture(request.image) for request in requests}
        prompts = [
            {"prompt_token_ids": _one_placeholder(request), "multi_modal_data": {"image": images[id(request.image)]}}
            for request in requests
        ]
        return [_completion(answer) for answer in self._llm.generate(prompts, parameters, use_tqdm=False)]

    def _start(self) -> None:
        """Start vLLM in this process, without a trace in its random numbers and its environment."""
        base = self.captioner.learner.network.base
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        folder = tempfile.mkdtemp(prefix="uae-engine-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        config.save_pretrained(folder)
        self.captioner.processor.save_pretrained(folder)
        limits = {"max_model_len": self.settings.max_model_len, "max_num_seqs": self.settings.max_num_seqs}
        torch.cuda.empty_cache()
        with isolate_rng(), _environment(self.captioner.device):
            self._llm = self._vllm.LLM(
                model=folder,
                load_format="dummy",
                dtype=self.settings.dtype,
                gpu_memory_utilization=self.settings.gpu_memory_utilization,
                enforce_eager=self.settings.enforce_eager,
                enable_sleep_mode=self.settings.sleep,
                logprobs_mode=LOGPROBS,
                generation_config="vllm",  # not the checkpoint's
                limit_mm_per_prompt={"image": 1, "video": 0},
                distributed_executor_backend="external_launcher",  # this process is the only worker
                **{name: value for name, value in limits.items() if value is not None},
            )
        mode = self._llm.llm_engine.model_config.logprobs_mode
        if mode != LOGPROBS:
            raise RuntimeError(f"{KEY}: vLLM reports {mode}; allowed: {LOGPROBS}, which are those of the policy")


def _library() -> Any:
    """The module vllm.

    Raises:
        ValueError: It is missing or too old, or there is no GPU.
    """
    try:
        import vllm
    except ImportError as error:
        raise ValueError(f"{KEY} needs vLLM (Python 3.11 or newer): pip install 'uae[vllm]', or set {KEY} to null") from error
    if Version(vllm.__version__) < Version(OLDEST):
        raise ValueError(f"{KEY}: vLLM {vllm.__version__} is installed; allowed: {OLDEST} or newer: pip install 'uae[vllm]'")
    if not _has_gpu():
        raise ValueError(f"{KEY} needs a CUDA device, and this machine has none; set {KEY} to null")
    return vllm


def _has_gpu() -> bool:
    return torch.cuda.is_available()


@contextmanager
def _environment(device: torch.device) -> Iterator[None]:
    """What vLLM reads while it starts inside a process of a run: it has the rank of the process and shares its group."""
    several = distributed.is_available() and distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
    wanted: dict[str, int | str] = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": device.index or 0}
    wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = 0  # else its worker would be another process, which functions do not reach
    if not several:
        wanted |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in wanted.items()})
    try:
        yield
    finally:
        for name in wanted:
            os.environ.pop(name)
        os.environ.update({name: before[name] for name in wanted if name in before})


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _one_placeholder(request: Request) -> list[int]:
    """The prompt with one placeholder for the whole image, as vLLM takes it."""
    runs = ((token, list(run)) for token, run in groupby(request.prompt))
    return [token for token, run in runs for _ in (run[:1] if token == request.placeholder else run)]


def _picture(image: Tensor) -> Any:
    """The image as `HFCaptioner.prepare` rounds it."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _completion(answer: Any) -> Completion:
    (output,) = answer.outputs
    tokens = list(output.token_ids)
    logprobs = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
    return Completion(list(answer.prompt_token_ids), tokens, logprobs)
