"""The pipeline as types: what flows between an image, its captions, their reconstructions and the reward.

    image --Captioner--> G captions --Conditioner--> condition --Renderer--> G reconstructions --Reward--> advantage --> loss

Legend used by every file (tensors carry it as a suffix):

    B images   G captions per image   N = B*G rows, row n belongs to image n // G
    T caption tokens   S image actions (image tokens or SDE steps)   V vocabulary   D embedding   C H W pixels

Images between components are float ``[N, 3, H, W]``, RGB, in ``[0, 1]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypedDict, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from uae.learner import Learner


class ImageBatch(TypedDict, total=False):
    """What a DataModule yields. ``image`` and ``id`` are always there."""

    image: Tensor  # [B, 3, H, W] in [0, 1]
    id: Tensor  # [B] int64, unique in the data set and stable between runs
    name: list[str]  # file name, or "val-3" for a scene
    scene: list[Any]  # ground truth of the procedural scenes; absent for real images
    caption: list[str]  # of the data set, for supervised training; absent where an image has none


@dataclass(frozen=True)
class Sampling:
    """How captions are drawn. These settings *define* the policy: log-probs use the same ones.

    Args:
        temperature: Divides the logits, in sampling and in log-probs. 0 means greedy (log-probs then at temperature 1).
        max_tokens: Longest caption, in tokens, the end-of-sequence token included.
        top_p: Must stay 1. It would reshape the distribution in the sampler only, and the policy ratio would be wrong.
        top_k: Must stay 0, for the same reason.
        repetition_penalty: Must stay 1, for the same reason.
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
    def index(self, images: Sequence[int]) -> Any:
        """The same kind of context for a subset of its images."""
        ...


class Condition(Protocol):
    """What a renderer draws from: embeddings, token ids or plain strings. Opaque to everyone else."""

    def __len__(self) -> int: ...
    def index(self, rows: Sequence[int]) -> Any:
        """The same kind of condition for some of its rows."""
        ...


C = TypeVar("C", bound=Context)
D = TypeVar("D", bound=Condition)


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What a policy did: R rows of up to S actions, which are caption tokens, image tokens or denoising steps.

    Args:
        mask_RS: Float; 1 where there is an action, 0 where a row has ended.
        logp_RS: Detached log-probs of the actions as the sampler saw them; 0 where masked.
        entropy_RS: Detached entropies of the distributions that the actions were drawn from, in nats per action (per
            latent dimension for denoising steps); None where nothing was drawn, as for captions of a data set.
    """

    mask_RS: Tensor
    logp_RS: Tensor
    entropy_RS: Tensor | None = None

    def __len__(self) -> int:
        """R, the number of rows."""
        return len(self.mask_RS)

    def of(self, images: Sequence[int], per_image: int) -> Any:
        """The same kind of record for some images, each with ``per_image`` rows in a row, in the order given."""
        raise NotImplementedError


def rows_of(images: Sequence[int], per_image: int) -> list[int]:
    """Row numbers of some images, each of which has ``per_image`` rows in a row."""
    return [image * per_image + row for image in images for row in range(per_image)]


def _at(rows: list[int], values_R: Tensor | None) -> Tensor | None:
    return None if values_R is None else values_R[rows]


@dataclass(frozen=True, kw_only=True)
class Rollout(Actions, Generic[C]):
    """Captions as actions: R = N rows of S = T tokens. Filled by ``Captioner.sample``, read by conditioner, reward and loss.

    The mask is 1 up to and including the end-of-sequence token.

    Args:
        tokens_NT: int64 token ids; whatever follows the end of sequence is padding.
        texts: N decoded captions.
        context: The captioner's inputs for the B images.
        group: G, captions per image.
        temperature: Temperature of the policy, see `Sampling`.
    """

    tokens_NT: Tensor
    texts: list[str]
    context: C
    group: int
    temperature: float = 1.0

    def of(self, images: Sequence[int], per_image: int) -> Rollout[C]:
        """The captions of some images, in the order given; whole groups, so ``per_image`` is ``group``.

        Raises:
            ValueError: ``per_image`` is another number.
        """
        if per_image != self.group:
            raise ValueError(f"per_image={per_image} captions per image were asked for; allowed: group={self.group}")
        rows = rows_of(images, per_image)
        return replace(
            self,
            mask_RS=self.mask_RS[rows],
            logp_RS=self.logp_RS[rows],
            entropy_RS=_at(rows, self.entropy_RS),
            tokens_NT=self.tokens_NT[rows],
            texts=[self.texts[row] for row in rows],
            context=self.context.index(images),
        )


@dataclass(frozen=True, kw_only=True)
class Trajectory(Actions, Generic[D]):
    """An image's making as actions: R = N*M rows of S image tokens or denoising steps.

    Args:
        condition: What each row was drawn from.
        actions_RS: ``[R, S]`` image tokens, or ``[R, S, ...]`` latents.
    """

    condition: D
    actions_RS: Tensor

    def of(self, images: Sequence[int], per_image: int) -> Any:
        """The trajectories of some images, in the order given."""
        return self.select(rows_of(images, per_image))

    def select(self, rows: list[int]) -> Any:
        """The trajectories of some rows, in the order given."""
        return replace(
            self,
            mask_RS=self.mask_RS[rows],
            logp_RS=self.logp_RS[rows],
            entropy_RS=_at(rows, self.entropy_RS),
            condition=self.condition.index(rows),
            actions_RS=self.actions_RS[rows],
        )


A = TypeVar("A", bound=Actions)
A_contra = TypeVar("A_contra", bound=Actions, contravariant=True)


class Policy(Protocol[A_contra]):
    """Whoever acts and learns from rewards: a captioner, or a renderer whose actions have log-probs."""

    @property
    def learner(self) -> Learner[Any]:
        """The network that learns, and where it started."""
        ...

    def logprobs(self, actions: A_contra, /) -> Tensor:
        """Log-probs ``[R, S]`` of the actions under the current weights, with gradient; 0 where masked."""
        ...


class Captioner(Policy[Rollout[C]], Protocol[C]):
    """Image to text. The policy of *generation for understanding*."""

    def to(self, device: torch.device) -> Any:
        """Move the networks."""
        ...

    def prepare(self, images_BCHW: Tensor, instruction: str | None = None) -> C:
        """Images ``[B, 3, H, W]`` in [0, 1] and the question put beside them, as the model's inputs."""
        ...

    def sample(self, context: C, group: int, sampling: Sampling, seeds: Sequence[int]) -> Rollout[C]:
        """``group`` captions for every image; ``seeds`` has one number per row (N) and fully determines the samples."""
        ...


class Conditioner(Protocol):
    """Text to whatever the renderer is conditioned on."""

    truncated: int  # captions so far that were longer than the conditioner reads

    def to(self, device: torch.device) -> Any:
        """Move the networks."""
        ...

    def encode(self, texts: list[str], rollout: Rollout[Any] | None = None) -> Condition:
        """N captions to a condition of N rows.

        ``rollout`` is where the captions come from, if they come from one. It holds the images, so whoever reads it
        leaks past the text bottleneck, and says so in its name and docstring; all others ignore it.
        """
        ...


class Renderer(Protocol):
    """Condition to image."""

    def to(self, device: torch.device) -> Any:
        """Move the networks; images come out on ``device``."""
        ...

    def modules(self) -> list[nn.Module]:
        """The frozen networks that draw."""
        ...

    def render(self, condition: Any, seeds: Sequence[int], grad: bool = False) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1]; row n depends on condition n and seed n only."""
        ...


@runtime_checkable
class ImagePolicy(Renderer, Policy[A], Protocol[A]):
    """A renderer whose actions have log-probs. The policy of *understanding for generation*."""

    def sample(self, condition: Any, seeds: Sequence[int]) -> A:
        """One trajectory per row of the condition, determined by its seed."""
        ...

    def pixels(self, actions: A, /) -> Tensor:
        """The images ``[N, 3, H, W]`` in [0, 1] that the trajectories end in."""
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """A frozen image tower that owns its preprocessing. Constructing one loads nothing; ``load`` does."""

    def load(self, device: torch.device | str = "cpu") -> ImageEncoder:
        """Load the weights (once) and move them; returns itself. Idempotent."""
        ...

    def embed(self, images_NCHW: Tensor) -> Tensor:
        """float32 embeddings ``[N, D]``, not normalised; no gradient is needed."""
        ...


@dataclass(frozen=True)
class Rewards:
    """A reward with its named parts. Filled by ``WeightedReward``, read by advantages and logging."""

    reward_BG: Tensor  # the weighted sum
    parts: dict[str, Tensor] = field(default_factory=dict)  # name -> [B, G], unweighted
    weights: dict[str, float] = field(default_factory=dict)  # name -> the part's weight in the sum


@dataclass(frozen=True)
class UMM:
    """A unified multimodal model: three roles, which may share weights.

    Args:
        captioner: Writes captions of images.
        conditioner: Reads captions for the renderer.
        renderer: Draws captions.
        needs_reference: Whether the conditioner reads with the weights that the run started from
            (``captioner.learner.reference()``), so that they must be kept even if the loss has no KL term.
    """

    captioner: Captioner[Any]
    conditioner: Conditioner
    renderer: Renderer
    needs_reference: bool = False

    @property
    def image_policy(self) -> ImagePolicy[Any] | None:
        """The renderer, if its actions have log-probs."""
        return self.renderer if isinstance(self.renderer, ImagePolicy) else None


class System(Protocol):
    """A named assembly. The constructor stores arguments; ``build`` loads weights on the CPU."""

    def build(self) -> UMM:
        """Load and assemble the three roles."""
        ...


@runtime_checkable
class PlannedSystem(System, Protocol):
    """A system whose memory can be planned before anything is loaded."""

    def blueprint(self) -> Any:
        """Its architectures without weights, a `uae.systems.blueprints.Blueprint`."""
        ...
