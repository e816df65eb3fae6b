"""Unified-Score: how much of an image survives image -> caption -> image (arXiv 2509.09666, Unified-Bench protocol 1).

`matched_and_mismatched`, `one_row_per_image` and `unified_score` are the computation. `UnifiedScore` keeps what they need
from batch to batch, and gathers it from all processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from uae.encoders import similarity
from uae.metrics.intervals import bootstrap as bootstrap_interval
from uae.types import ImageEncoder

__all__ = ["UnifiedScore", "matched_and_mismatched", "one_row_per_image", "similarity", "unified_score"]

_RESERVED = ("unified", "held_out", "floor", "calibrated", "n", "n_invalid", "ci95", "ci95_low", "ci95_high")
_COLUMNS = ("id_high", "id_low", "mismatched", "invalid")  # of the table that the states are; then one per encoder
_CHUNK = 1 << 24  # float32 is exact below; int64 states hang the sync when a process saw no data


def matched_and_mismatched(encoders: Iterable[ImageEncoder], reconstructions: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of a batch under E encoders.

    Args:
        encoders: The E encoders.
        reconstructions: Float ``[N, 3, H, W]`` in [0, 1].
        sources: Float ``[N, 3, H', W']`` in [0, 1]; row n belongs to reconstruction n.

    Returns:
        Two tensors float32 ``[E, N]`` in [-1, 1]: the cosines of the reconstructions with their own sources, and with the
        sources one row before (the first reconstruction with the last source). NaN where an image has no embedding.
    """
    matched, mismatched = [], []
    for encoder in encoders:
        reconstruction_ND, source_ND = encoder.embed(reconstructions), encoder.embed(sources)
        matched.append(similarity(reconstruction_ND, source_ND))
        mismatched.append(similarity(reconstruction_ND, source_ND.roll(1, 0)))
    return torch.stack(matched), torch.stack(mismatched)


def one_row_per_image(table: np.ndarray) -> np.ndarray:
    """The rows in an order that neither samplers nor the number of processes can change, without duplicates.

    Args:
        table: ``[N, K]``. The first two columns are the id of the image; a negative id has no duplicates.
    """
    table = table[np.lexsort(table.T[::-1])]  # NaN sorts last: a duplicate with a mismatched pair wins over one without
    repeated = (table[1:, :2] == table[:-1, :2]).all(1) & (table[1:, 0] >= 0)
    return table[np.concatenate([[True], ~repeated])]


def unified_score(
    cosine_NE: np.ndarray,
    mismatched_N: np.ndarray,
    invalid_N: np.ndarray,
    names: Sequence[str],
    held_out: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """The scores of N images, as `UnifiedScore.compute` describes them.

    Args:
        cosine_NE: Cosines ``[N, E]`` of sources and reconstructions under each encoder, in [-1, 1].
        mismatched_N: Cosines ``[N]`` of the reconstructions with sources that are not their own, averaged over the
            encoders; NaN where there is no such pair.
        invalid_N: 1 for an image without an embedding, else 0, ``[N]``.
        names: The names of the E encoders.
        held_out: The names of the encoders that no reward uses.
        resamples: How often the images are drawn again for the confidence interval; 0 leaves it out.
        seed: Seed of these draws.
    """
    scores = dict(zip(names, cosine_NE.mean(0).tolist(), strict=True))
    row_N = cosine_NE.mean(1)
    result = {"unified": float(row_N.mean()), **scores}
    if held_out:
        result["held_out"] = float(np.mean([scores[name] for name in held_out]))
    floor_N = mismatched_N[~np.isnan(mismatched_N)]
    if len(floor_N):
        floor = float(floor_N.mean())
        result |= {"floor": floor, "calibrated": (result["unified"] - floor) / max(1 - floor, 1e-6)}
    result |= {"n": float(len(row_N)), "n_invalid": float(invalid_N.sum())}
    if resamples:
        _, low, high = bootstrap_interval(row_N, resamples, seed)
        result |= {"ci95": (high - low) / 2, "ci95_low": low, "ci95_high": high}
    return result


class UnifiedScore(Metric):
    """Cosine similarity of source and reconstruction under several encoders, averaged over images, then over encoders.

    Unrelated images score far above 0, too. So the score of mismatched pairs is reported beside the score as its floor.

    Works over several processes, also if some of them see more images than others. The encoders are never part of the
    metric's parameters, state dicts, copies or pickles. The metric is not differentiable. `compute` returns a dictionary;
    log it with ``log_dict`` on every process.

    Args:
        encoders: The encoders by name. The paper takes CLIP, LongCLIP, DINOv2 and DINOv3.
        held_out: Names of the encoders that no reward uses.
        bootstrap: How often the images are drawn again for the confidence interval; 0 leaves the interval out.
        seed: Seed of these draws.

    Raises:
        ValueError: There is no encoder, an encoder has the name of one of the scores, or ``held_out`` names none of them.

    Example:
        >>> import torch
        >>> from uae.encoders import LayoutEncoder
        >>> from uae.metrics import UnifiedScore
        >>> metric = UnifiedScore({"coarse": LayoutEncoder(2), "fine": LayoutEncoder(8)}, held_out=("fine",), bootstrap=0)
        >>> sources = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])  # a black image and a white one
        >>> reconstructions = sources.clone()
        >>> reconstructions[1, :, :, 8:] = 0  # the right half of the white one was redrawn in black
        >>> metric.update(reconstructions, sources)
        >>> scores = metric.compute()
        >>> {name: round(scores[name], 3) for name in ("fine", "unified", "floor", "calibrated")}
        {'fine': 0.5, 'unified': 0.5, 'floor': -0.5, 'calibrated': 0.667}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(
        self,
        encoders: dict[str, ImageEncoder],
        held_out: tuple[str, ...] = (),
        bootstrap: NonNegativeInt = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_names(tuple(encoders), tuple(held_out))
        self.encoders = dict(encoders)  # a plain dict: nothing in it is registered as a submodule
        self.held_out = tuple(held_out)
        self.bootstrap = bootstrap
        self.seed = seed
        # One float32 number per image and state: 2-D and integer lists break the sync of a process without data.
        self._columns = [*_COLUMNS, *(f"cosine_{i}" for i in range(len(encoders)))]
        for column in self._columns:
            self.add_state(column, default=[], dist_reduce_fx="cat")

    def load(self, device: torch.device | str = "cpu") -> UnifiedScore:
        """Load every encoder onto a device; returns the metric. Without it, the first update loads them."""
        for encoder in self.encoders.values():
            encoder.load(device)
        return self

    def update(self, reconstructions: Tensor, sources: Tensor, ids: Tensor | Sequence[int] | None = None) -> None:
        """Score a batch.

        Args:
            reconstructions: Float ``[N, 3, H, W]`` in [0, 1].
            sources: Float ``[N, 3, H', W']`` in [0, 1]; row n belongs to reconstruction n.
            ids: A whole number in [0, 2**48) for every image. An image that comes twice counts once, as samplers fill the
                last batch with images of the first. Without ids, every image counts.

        Raises:
            ValueError: The lengths differ, an id is out of its range, or pixels are outside of [0, 1]. NaN pixels are
                allowed: such a pair scores 0 and is counted in ``n_invalid``.
        """
        count = len(sources)
        if len(reconstructions) != count or (ids is not None and len(ids) != count):
            raise ValueError(
                f"UnifiedScore.update needs one source and one id per reconstruction, got {len(reconstructions)} "
                f"reconstructions, {count} sources, {'no' if ids is None else len(ids)} ids"
            )
        if count == 0:
            return
        _check_range(reconstructions, "reconstructions")
        _check_range(sources, "sources")
        self.load(sources.device)
        id_N = _as_ids(ids, count).to(sources.device)
        matched_EN, mismatched_EN = matched_and_mismatched(self.encoders.values(), reconstructions, sources)
        # A neighbour that is the same image (or the row itself, in a batch of one) is no mismatched pair.
        same_N = (id_N == id_N.roll(1)) & (id_N >= 0) if count > 1 else torch.ones_like(id_N, dtype=torch.bool)
        rows = [
            id_N.div(_CHUNK, rounding_mode="floor"),
            id_N.remainder(_CHUNK),
            mismatched_EN.mean(0).masked_fill(same_N, torch.nan),
            matched_EN.isnan().any(0),
            *matched_EN.nan_to_num(nan=0.0),
        ]
        for column, row_N in zip(self._columns, rows, strict=True):
            getattr(self, column).append(row_N.float())

    def last_held_out(self) -> Tensor:
        """What the last batch scored under the held-out encoders: the mean cosine of every image, float32 ``[N]``.

        Values are in [-1, 1], 0 where an image has no embedding. Repeated images are all there. There has to be a held-out
        encoder, and an update since the last reset.
        """
        places = [place for place, name in enumerate(self.encoders) if name in self.held_out]
        return torch.stack([getattr(self, f"cosine_{place}")[-1] for place in places]).mean(0)

    def compute(self) -> dict[str, float]:
        """The scores of all images since the last reset, of all processes together.

        Returns:
            Cosines in [-1, 1], which the paper multiplies by 100:

            * every encoder's name: the mean over the images; ``unified``: the mean of these means;
            * ``held_out``: the mean over the held-out encoders, if there are any;
            * ``floor``: the mean over mismatched pairs, each a reconstruction and the source one row before its own, and
              ``calibrated`` = (unified - floor) / (1 - floor). Both are missing if every batch held one image only;
            * ``ci95_low`` and ``ci95_high``: the ends of the 95 % confidence interval of ``unified`` (percentile bootstrap
              over images), and ``ci95``, half its width.

            And two counts of images: ``n``, and ``n_invalid`` without an embedding.

        Raises:
            ValueError: There was no image.
        """
        states = [getattr(self, column) for column in self._columns]
        if not sum(len(state) for state in states):
            raise ValueError("UnifiedScore.compute() saw no image on any process; call update() first")
        columns = np.stack([dim_zero_cat(state).cpu().double().numpy() for state in states], axis=1)
        table = one_row_per_image(columns)
        _, _, mismatched_N, invalid_N = table[:, : len(_COLUMNS)].T
        cosine_NE = table[:, len(_COLUMNS) :]
        return unified_score(cosine_NE, mismatched_N, invalid_N, tuple(self.encoders), self.held_out, self.bootstrap, self.seed)


def _check_names(names: tuple[str, ...], held_out: tuple[str, ...]) -> None:
    unknown = sorted(set(held_out) - set(names))
    reserved = sorted(set(names) & set(_RESERVED))
    if not names or unknown or reserved:
        raise ValueError(
            f"UnifiedScore has encoders {list(names)} and held_out {list(held_out)}; there must be an encoder, "
            f"held_out must name encoders (unknown: {unknown}), and no encoder may have the name of a score "
            f"(taken: {reserved}); set model.init_args.unified_score.init_args.encoders and "
            "model.init_args.unified_score.init_args.held_out"
        )


def _check_range(images: Tensor, name: str) -> None:
    low, high = -1e-4, 1 + 1e-4
    if not images.is_floating_point() or ((images < low) | (images > high)).any():
        raise ValueError(f"{name} must be float in [0, 1], got {images.dtype} from {images.min():g} to {images.max():g}")


def _as_ids(ids: Tensor | Sequence[int] | None, count: int) -> Tensor:
    """Ids int64 ``[N]``: -1 for images without an id, which are never duplicates."""
    if ids is None:
        return torch.full((count,), -1)
    id_N = torch.as_tensor(ids).reshape(count)
    if id_N.is_floating_point() or (id_N < 0).any() or (id_N >= _CHUNK**2).any():
        raise ValueError(f"ids must be whole numbers in [0, 2**48), got {id_N.tolist()[:4]} ...")
    return id_N.long()
