"""Unified-Score: how well images survive image -> caption -> image (arXiv 2509.09666, Unified-Bench protocol 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from uae.encoders import similarity
from uae.metrics.intervals import bootstrap
from uae.types import ImageEncoder

__all__ = ["UnifiedScore", "similarity"]

_RESERVED = ("unified", "held_out", "floor", "calibrated", "n", "n_invalid", "ci95", "ci95_low", "ci95_high")
_CHUNK = 1 << 24  # float32 is exact below; int64 states hang the sync when a process saw no data


class UnifiedScore(Metric):
    """Cosine similarity of source and reconstruction under several encoders, averaged over images, then encoders.

    Raw cosines have a high floor (unrelated images score far above 0), so the score of mismatched pairs is reported
    next to them. Works across processes, also uneven ones; the encoders are never part of parameters, state dicts,
    copies or pickles. Not differentiable. ``compute`` returns a dict: log it with ``log_dict``, on every process.

    Args:
        encoders: Name to encoder. The paper's four: CLIP, LongCLIP, DINOv2, DINOv3.
        held_out: Names of the encoders that no reward uses.
        bootstrap: Resamples for the confidence interval; 0 leaves it out.
        seed: Of the bootstrap.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(
        self,
        encoders: dict[str, ImageEncoder],
        held_out: tuple[str, ...] = (),
        bootstrap: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_names(tuple(encoders), tuple(held_out))
        if bootstrap < 0:
            raise ValueError(f"bootstrap={bootstrap}; allowed: 0 (no interval) or more; set init_args.bootstrap")
        self.encoders = dict(encoders)  # a plain dict: nothing in it is registered as a submodule
        self.held_out = tuple(held_out)
        self.bootstrap = bootstrap
        self.seed = seed
        # One float32 number per image and state: 2-D and integer lists break the sync of a process without data.
        self._columns = ["id_high", "id_low", "floor", "invalid", *(f"cosine_{i}" for i in range(len(encoders)))]
        for column in self._columns:
            self.add_state(column, default=[], dist_reduce_fx="cat")

    def load(self, device: Any = "cpu") -> UnifiedScore:
        """Load every encoder now (else at the first update); returns itself."""
        for encoder in self.encoders.values():
            encoder.load(device)
        return self

    def update(self, reconstructions: Tensor, sources: Tensor, ids: Tensor | Sequence[int] | None = None) -> None:
        """Score a batch.

        Args:
            reconstructions: float ``[N, 3, H, W]`` in [0, 1].
            sources: float ``[N, 3, H', W']`` in [0, 1]; row n belongs to reconstruction n.
            ids: One whole number in [0, 2**48) per image. An image seen twice counts once: samplers
                pad the last batch.

        Raises:
            ValueError: Lengths differ, ids out of range, or pixels outside [0, 1]. NaN pixels are allowed: such a
                pair scores 0 and is counted in ``n_invalid``.
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
        cosine_EN, mismatched_EN = self._cosines(reconstructions, sources)
        # A neighbour that is the same image (or the row itself, in a batch of one) is no mismatched pair.
        same_N = (id_N == id_N.roll(1)) & (id_N >= 0) if count > 1 else torch.ones_like(id_N, dtype=torch.bool)
        rows = [
            id_N.div(_CHUNK, rounding_mode="floor"),
            id_N.remainder(_CHUNK),
            mismatched_EN.mean(0).masked_fill(same_N, torch.nan),
            cosine_EN.isnan().any(0),
            *cosine_EN.nan_to_num(nan=0.0),
        ]
        for column, row_N in zip(self._columns, rows, strict=True):
            getattr(self, column).append(row_N.float())

    def _cosines(self, reconstructions: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        """``[E, N]`` of the pairs, and of every reconstruction with the source one row before its own."""
        matched, mismatched = [], []
        for encoder in self.encoders.values():
            reconstruction_ND, source_ND = encoder.embed(reconstructions), encoder.embed(sources)
            matched.append(similarity(reconstruction_ND, source_ND))
            mismatched.append(similarity(reconstruction_ND, source_ND.roll(1, 0)))
        return torch.stack(matched), torch.stack(mismatched)

    def compute(self) -> dict[str, float]:
        """The scores of everything seen since the last reset, on all processes together.

        Returns:
            Cosines in [-1, 1] (times 100 in reports): ``unified`` (mean of the encoders' means); every encoder's name;
            ``held_out`` (mean of the held-out encoders, if there are any); ``floor`` (mean of mismatched pairs: each
            reconstruction with its neighbour's source) and ``calibrated`` = (unified - floor) / (1 - floor), unless
            every batch held one image; ``n`` and ``n_invalid`` images; the percentile bootstrap over images
            ``ci95_low``, ``ci95_high`` and half its width, ``ci95``.

        Raises:
            ValueError: Nothing was seen.
        """
        table = self._table()
        scores = dict(zip(self.encoders, table[:, 4:].mean(0).tolist(), strict=True))
        row_N = table[:, 4:].mean(1)
        result = {"unified": float(row_N.mean()), **scores}
        if self.held_out:
            result["held_out"] = float(np.mean([scores[name] for name in self.held_out]))
        floor_N = table[:, 2][~np.isnan(table[:, 2])]
        if len(floor_N):
            floor = float(floor_N.mean())
            result |= {"floor": floor, "calibrated": (result["unified"] - floor) / max(1 - floor, 1e-6)}
        result |= {"n": float(len(table)), "n_invalid": float(table[:, 3].sum())}
        if self.bootstrap:
            _, low, high = bootstrap(row_N, self.bootstrap, self.seed)
            result |= {"ci95": (high - low) / 2, "ci95_low": low, "ci95_high": high}
        return result

    def _table(self) -> np.ndarray:
        """One row per image, duplicates dropped, in an order that no sampler or process count can change."""
        states = [getattr(self, column) for column in self._columns]
        if not sum(len(state) for state in states):
            raise ValueError("UnifiedScore.compute() saw no image on any process; call update() first")
        table = np.stack([dim_zero_cat(state).cpu().double().numpy() for state in states], axis=1)
        table = table[np.lexsort(table.T[::-1])]  # NaN sorts last: a duplicate with a floor wins over one without
        repeated = (table[1:, :2] == table[:-1, :2]).all(1) & (table[1:, 0] >= 0)
        return table[np.concatenate([[True], ~repeated])]


def _check_names(names: tuple[str, ...], held_out: tuple[str, ...]) -> None:
    unknown = sorted(set(held_out) - set(names))
    reserved = sorted(set(names) & set(_RESERVED))
    if not names or unknown or reserved:
        raise ValueError(
            f"UnifiedScore has encoders {list(names)} and held_out {list(held_out)}; there must be an encoder, "
            f"held_out must name encoders (unknown: {unknown}), and no encoder may take a result's name "
            f"(taken: {reserved}); set init_args.encoders and init_args.held_out"
        )


def _check_range(images: Tensor, name: str) -> None:
    low, high = -1e-4, 1 + 1e-4
    if not images.is_floating_point() or ((images < low) | (images > high)).any():
        raise ValueError(
            f"{name} must be float in [0, 1], got {images.dtype} from {images.min():g} to {images.max():g}"
        )


def _as_ids(ids: Tensor | Sequence[int] | None, count: int) -> Tensor:
    """int64 ``[N]``; -1 for images without an id, which are never duplicates."""
    if ids is None:
        return torch.full((count,), -1)
    id_N = torch.as_tensor(ids).reshape(count)
    if id_N.is_floating_point() or (id_N < 0).any() or (id_N >= _CHUNK**2).any():
        raise ValueError(f"ids must be whole numbers in [0, 2**48), got {id_N.tolist()[:4]} ...")
    return id_N.long()

