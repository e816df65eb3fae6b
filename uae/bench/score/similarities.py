"""The cosines that protocol 1 averages: of all pairs of source and reconstruction, and of mismatched pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from uae.bench.result import Score, score
from uae.bench.score.features import EncodedImage, ImageFeatures
from uae.encoders import similarity
from uae.metrics.intervals import bootstrap


@dataclass
class Similarities:
    """The pairs that could be read, ordered by the source's name.

    Args:
        encoders: Names of the E encoders.
        names: Names of the N sources, relative to their folder.
        digests: The sha256 of each pair's source and reconstruction.
        cosine_NE: Cosine of each pair under each encoder, float64 in [-1, 1].
        floor_NE: Cosine of each reconstruction with another pair's source; NaN if there is no other source image.
        unreadable: File that cannot be read to the reason; its pair is in none of the above.
        invalid: Sources of pairs with an embedding without direction (NaN, Inf or all zeros), whose cosine counts as 0.
    """

    encoders: tuple[str, ...]
    names: list[str] = field(default_factory=list)
    digests: list[tuple[str, str]] = field(default_factory=list)
    cosine_NE: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    floor_NE: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    unreadable: dict[str, str] = field(default_factory=dict)
    invalid: list[str] = field(default_factory=list)


def measure(
    features: ImageFeatures, matched: Mapping[str, str], sources: Path, reconstructions: Path, progress: bool = True
) -> Similarities:
    """Embed all pairs and compute their cosines. Memory does not grow with the number of pairs.

    Mismatched pairs form one ring through all pairs, in the order of their names' hashes: files with neighbouring names often
    show similar images, and this order depends neither on the batch size nor on the number of threads.

    Args:
        features: Embeds the images.
        matched: Source to reconstruction, as names relative to their folders.
        sources: Folder of the sources.
        reconstructions: Folder of the reconstructions.
        progress: Whether to show a progress bar.
    """
    order = sorted(matched, key=lambda name: hashlib.sha256(name.encode()).digest())
    size = max(1, features.batch_size // 2)
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    files = [[file for n in group for file in (sources / n, reconstructions / matched[n])] for group in groups]
    ring = _Ring(tuple(features.encoders))
    with tqdm(total=len(order), unit="pair", desc="scoring", disable=not progress) as bar:
        for group, seen in zip(groups, features.stream(files), strict=True):
            ring.add([(name, matched[name]) for name in group], list(zip(seen[::2], seen[1::2], strict=True)))
            bar.update(len(group))
    return ring.close()


class _Ring:
    """Collects the cosines of each pair, and of each reconstruction with the previous pair's source; the first follows the last."""

    def __init__(self, encoders: tuple[str, ...]) -> None:
        self.found = Similarities(encoders)
        self.first: tuple[EncodedImage, EncodedImage] | None = None
        self.last: EncodedImage | None = None  # the source of the last pair
        self.cosines: list[np.ndarray] = []  # of every group of pairs, float64 [M, E]
        self.floors: list[np.ndarray] = []

    def add(self, names: Sequence[tuple[str, str]], images: Sequence[tuple[EncodedImage, EncodedImage]]) -> None:
        """Add the next pairs, each a source and a reconstruction, without those that cannot be read."""
        readable = []
        for (name, file), (source, reconstruction) in zip(names, images, strict=True):
            failures = {f"sources/{name}": source.failure, f"reconstructions/{file}": reconstruction.failure}
            broken = {path: reason for path, reason in failures.items() if reason}
            self.found.unreadable |= broken
            if not broken:
                readable.append((name, source, reconstruction))
        if not readable:
            return
        kept, sources, reconstructions = map(list, zip(*readable, strict=True))
        self.first = self.first or (sources[0], reconstructions[0])
        cosine_ME = self._cosines(sources, reconstructions)
        valid_ME = np.isfinite(cosine_ME)
        self.found.invalid += [name for name, valid_E in zip(kept, valid_ME, strict=True) if not valid_E.all()]
        self.found.names += kept
        self.found.digests += [(one.digest, other.digest) for one, other in zip(sources, reconstructions, strict=True)]
        self.cosines.append(np.where(valid_ME, cosine_ME, 0.0))
        # The very first pair has none before it: its row is NaN until `close` fills it.
        self.floors.append(self._mismatched([self.last or sources[0], *sources[:-1]], sources, reconstructions))
        self.last = sources[-1]

    def close(self) -> Similarities:
        """Return all cosines, ordered by the source's name."""
        found = self.found
        if self.first is None or self.last is None:
            return found
        source, reconstruction = self.first  # its reconstruction is compared with the last source, which closes the ring
        self.floors[0][0] = self._mismatched([self.last], [source], [reconstruction])[0]
        order = sorted(range(len(found.names)), key=lambda n: found.names[n])
        found.cosine_NE, found.floor_NE = np.concatenate(self.cosines)[order], np.concatenate(self.floors)[order]
        found.names, found.digests = [found.names[n] for n in order], [found.digests[n] for n in order]
        found.invalid, found.unreadable = sorted(found.invalid), dict(sorted(found.unreadable.items()))
        return found

    def _mismatched(
        self, others: Sequence[EncodedImage], sources: Sequence[EncodedImage], reconstructions: Sequence[EncodedImage]
    ) -> np.ndarray:
        """Cosines of reconstructions with other pairs' sources; NaN if that source is the same image as the pair's own."""
        same_M = np.array([other.digest == source.digest for other, source in zip(others, sources, strict=True)])
        return np.where(same_M[:, None], np.nan, self._cosines(others, reconstructions))

    def _cosines(self, some: Sequence[EncodedImage], others: Sequence[EncodedImage]) -> np.ndarray:
        """Cosines float64 ``[M, E]`` of M images with M others."""

        def rows(images: Sequence[EncodedImage], name: str) -> Tensor:
            return torch.stack([image.feature[name] for image in images])

        columns_EM = [similarity(rows(some, name), rows(others, name)) for name in self.found.encoders]
        return np.array([column_M.double().numpy() for column_M in columns_EM]).T


def summarize(found: Similarities, held_out: tuple[str, ...], resamples: int, seed: int = 0) -> dict[str, Score]:
    """Means with 95 % bootstrap intervals over images, cosines in [-1, 1].

    ``overall`` is the mean of the encoders' means; then ``held_out``, every encoder, and of each of them ``floor/<name>``
    (mismatched pairs) and ``calibrated/<name>`` = (mean - floor) / (1 - floor), whose interval counts both as uncertain.
    All intervals use the same resampled images.
    """
    scores: dict[str, Score] = {}
    floors: dict[str, Score] = {}
    for name, at in columns(found.encoders, held_out).items():
        cosine_N, floor_N = found.cosine_NE[:, at].mean(1), found.floor_NE[:, at].mean(1)
        scores[name] = score(bootstrap(cosine_N, resamples, seed), len(cosine_N))
        known_N = floor_N[np.isfinite(floor_N)]
        if len(known_N):
            floors[f"floor/{name}"] = score(bootstrap(known_N, resamples, seed), len(known_N))
            floors[f"calibrated/{name}"] = score(bootstrap(_calibrated(cosine_N, floor_N), resamples, seed), len(cosine_N))
    return scores | floors


def columns(encoders: Sequence[str], held_out: Sequence[str]) -> dict[str, list[int]]:
    """Name of each score to the positions of the encoders whose mean it is."""
    groups = {"overall": encoders, **({"held_out": held_out} if held_out else {}), **{name: [name] for name in encoders}}
    return {title: [encoders.index(name) for name in names] for title, names in groups.items()}


def _calibrated(cosine_N: np.ndarray, floor_N: np.ndarray) -> np.ndarray:
    """Contribution of each pair to the calibrated score, to first order; the mean over pairs is the calibrated score."""
    floor = float(np.nanmean(floor_N))
    room = max(1 - floor, 1e-6)
    ratio = (cosine_N.mean() - floor) / room
    drift_N = np.where(np.isfinite(floor_N), floor_N - floor, 0.0) * (1 - ratio) / room
    return (cosine_N - floor) / room - drift_N
