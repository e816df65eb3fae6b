"""The pipeline as types: what flows between an image, its captions, their reconstructions and the reward.

    image --Captioner--> G captions --Conditioner--> condition --Renderer--> G reconstructions --Reward--> advantage --> loss

Legend used by every file (tensors carry it as a suffix):

    B images   G captions per image   N = B*G rows, row n belongs to image n // G
    T caption tokens   S image actions (image tokens or SDE steps)   V vocabulary   D embedding   C H W pixels

Images between components are float ``[N, 3, H, W]``, RGB, in ``[0, 1]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor


class ImageBatch(TypedDict, total=False):
    """What a DataModule yields. ``image`` and ``id`` are always there."""

    image: Tensor  # [B, 3, H, W] in [0, 1]
    id: Tensor  # [B] int64, unique in the data set and stable between runs
    name: list[str]  # file name or "scene-<id>"
    scene: list[Any]  # ground truth of the procedural scenes; absent for real images
    caption: list[str]  # of the data set, for supervised training; absent where an image has none


@dataclass(frozen=True)
class Sampling:
    """How captions are drawn. These settings *define* the policy: log-probs use the same ones.

    Args:
        temperature: Divides the logits, in sampling and in log-probs. 0 means greedy (log-probs then at temperature 1).
        max_tokens: Longest caption, in tokens, the end-of-sequence token included.
        top_p, top_k, repetition_penalty: Must stay neutral. They would reshape the distribution in the sampler only,
            and the policy ratio would be wrong.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what would make log-probs inexact."""
        neutral = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
        for key, value in neutral.items():
            if getattr(self, key) != value:
                raise ValueError(
                    f"sampling.{key}={getattr(self, key)} reshapes the distribution in the sampler only, so log-probs and "
                    f"the policy ratio would be wrong; only {key}={value} is allowed: remove sampling.{key} and use "
                    "sampling.temperature instead"
                )
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature={self.temperature}; allowed: 0 (greedy) or any positive number")
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens={self.max_tokens}; allowed: 1 or more")

    @property
    def policy_temperature(self) -> float:
        """The temperature log-probs are computed at: 1 for greedy decoding."""
        return self.temperature or 1.0


class Context(Protocol):
    """A captioner's inputs for B images. Opaque to everyone but the captioner that prepared it."""

    def __len__(self) -> int: ...
    def index(self, images: Sequence[int]) -> Context:
        """The same context for a subset of its images."""
        ...

    def repeat(self, group: int) -> Context:
        """Every image ``group`` times in a row: B images become N = B*group."""
        ...


@dataclass(frozen=True)
class Rollout:
    """What a caption policy did. Filled by ``Captioner.sample``, read by conditioner, reward and loss."""

    tokens_NT: Tensor  # int64; whatever follows the end of sequence is padding
    mask_NT: Tensor  # float, 1 up to and including the end-of-sequence token
    logp_NT: Tensor  # detached log-probs of tokens_NT under the policy that sampled; 0 where masked
    texts: list[str]  # N decoded captions
    context: Context  # of the B images
    group: int  # G
    temperature: float = 1.0  # the policy's, see Sampling

    def __len__(self) -> int:
        """N, the number of captions."""
        return len(self.texts)

    def select(self, images: Sequence[int]) -> Rollout:
        """The rollout of some of its images; whole groups, in the order given."""
        rows = [image * self.group + g for image in images for g in range(self.group)]
        return replace(
            self,
            tokens_NT=self.tokens_NT[rows],
            mask_NT=self.mask_NT[rows],
            logp_NT=self.logp_NT[rows],
            texts=[self.texts[row] for row in rows],
            context=self.context.index(images),
        )


class Condition(Protocol):
    """What a renderer draws from: embeddings, token ids or plain strings. Opaque to everyone else."""

    def __len__(self) -> int: ...
    def index(self, rows: Sequence[int]) -> Condition:
        """The condition of some of its rows."""
        ...


@dataclass(frozen=True)
class Trajectory:
    """What an image policy did: image tokens or SDE steps."""

    condition: Condition
    actions_NS: Tensor  # [N, S] or [N, S, ...]
    mask_NS: Tensor
    logp_NS: Tensor  # detached

    def __len__(self) -> int:
        """N, the number of images drawn."""
        return len(self.mask_NS)

    def select(self, rows: Sequence[int]) -> Trajectory:
        """The trajectories of some of its rows."""
        at = list(rows)
        return replace(
            self,
            condition=self.condition.index(at),
            actions_NS=self.actions_NS[at],
            mask_NS=self.mask_NS[at],
            logp_NS=self.logp_NS[at],
        )


class Captioner(Protocol):
    """Image to text. The policy of *generation for understanding*."""

    def prepare(self, images_BCHW: Tensor, instruction: str | None = None) -> Context:
        """Images and the question put beside them, as the model's inputs."""
        ...

    def sample(self, context: Context, group: int, sampling: Sampling, seeds: Sequence[int]) -> Rollout:
        """``group`` captions for every image; ``seeds`` has one number per row (N) and fully determines the samples."""
        ...

    def logprobs(self, rollout: Rollout) -> Tensor:
        """Teacher-forced log-probs ``[N, T]`` of the rollout's tokens under the current weights, with gradient."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the captioner computes with the weights the run started from."""
        ...


class Conditioner(Protocol):
    """Text to whatever the renderer is conditioned on."""

    truncated: int  # captions so far that were longer than the conditioner reads

    def encode(self, texts: list[str], rollout: Rollout | None = None) -> Condition:
        """N captions to a condition of N rows.

        ``rollout`` is where the captions come from, if they come from one. It holds the images, so whoever reads it
        leaks past the text bottleneck, and says so in its name and docstring; all others ignore it.
        """
        ...


class Renderer(Protocol):
    """Condition to image."""

    def render(self, condition: Condition, seeds: Sequence[int], grad: bool = False) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1]; row n depends on condition n and seed n only."""
        ...


class ImagePolicy(Renderer, Protocol):
    """A renderer whose actions have log-probs. The policy of *understanding for generation*."""

    def sample(self, condition: Condition, seeds: Sequence[int]) -> Trajectory:
        """One trajectory per row, determined by its seed."""
        ...

    def logprobs(self, trajectory: Trajectory) -> Tensor:
        """Log-probs ``[N, S]`` of the actions under the current weights, with gradient."""
        ...

    def pixels(self, trajectory: Trajectory) -> Tensor:
        """The images ``[N, 3, H, W]`` a trajectory ends in."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the policy computes with the weights the run started from."""
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """A frozen image tower that owns its preprocessing. Constructing one loads nothing; ``load`` does."""

    def load(self, device: Any = "cpu") -> ImageEncoder:
        """Load the weights (once) and move them; returns itself. Idempotent."""
        ...

    def embed(self, images_NCHW: Tensor) -> Tensor:
        """float32 embeddings ``[N, D]``, not normalised; no gradient is needed."""
        ...


class Reward(Protocol):
    """How good reconstructions (and captions) are. Higher is better."""

    def load(self, device: Any = "cpu") -> Reward:
        """Load what it needs (once); returns itself."""
        ...

    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """``reward_BG``, float32."""
        ...


@dataclass(frozen=True)
class Rewards:
    """A reward with its named parts. Filled by ``WeightedReward``, read by advantages and logging."""

    reward_BG: Tensor  # the weighted sum
    parts: dict[str, Tensor] = field(default_factory=dict)  # name -> [B, G], unweighted


@dataclass(frozen=True)
class UMM:
    """A unified multimodal model: three roles, which may share weights.

    Args:
        captioner, conditioner, renderer: The roles.
        needs_reference: The conditioner reads with the weights the run started from (``captioner.reference``), so they
            must be kept even if the loss has no KL term.
    """

    captioner: Captioner
    conditioner: Conditioner
    renderer: Renderer
    needs_reference: bool = False


class System(Protocol):
    """A named assembly. The constructor stores arguments; ``build`` loads weights on the CPU."""

    def build(self) -> UMM:
        """Load and assemble the three roles."""
        ...
