"""Embeds image files with several encoders: each file is read once, prepared in a thread, and embedded in batches."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from uae.bench.score.feature_cache import FeatureCache
from uae.encoders.preprocessing import Preprocessing
from uae.encoders.tower import Tower
from uae.files.pictures import UnreadableImageError, read_picture
from uae.types import ImageEncoder


@dataclass
class EncodedImage:
    """One image file and its embeddings.

    Args:
        digest: The sha256 of the file's content.
        failure: Why the file cannot be read; empty if it can.
        feature: Encoder name to the embedding, float32 ``[D]``.
        prepared: Encoder name to the image in the encoder's preprocessing, until it is embedded.
    """

    digest: str = ""
    failure: str = ""
    feature: dict[str, Tensor] = field(default_factory=dict)
    prepared: dict[str, Tensor] = field(default_factory=dict)


class ImageFeatures:
    """Embeds image files through a cache on disk.

    A `Tower` gets each image at its own size and prepares it as its official preprocessing does. Other encoders get float images
    in [0, 1], in batches of equal size.

    Args:
        encoders: Loaded encoders by name.
        fingerprints: Encoder name to its fingerprint; the embeddings of an encoder without one (None) are not cached.
        cache: Cache of the embeddings.
        device: Device of the encoders.
        batch_size: Most images per forward pass.
        workers: Number of threads that read and prepare images.
        max_pixels: Images with more pixels count as unreadable.
    """

    def __init__(
        self,
        encoders: dict[str, ImageEncoder],
        fingerprints: dict[str, str | None],
        cache: FeatureCache,
        device: str,
        batch_size: int,
        workers: int,
        max_pixels: int,
    ) -> None:
        self.encoders = dict(encoders)
        # Embeddings from another kind of device differ in their last digits, so that equal images would not be exactly equal.
        self.keys = {name: mark and f"{mark} {torch.device(device).type}" for name, mark in fingerprints.items()}
        self.cache, self.device, self.batch_size = cache, device, batch_size
        self.workers, self.max_pixels = workers, max_pixels

    def stream(self, groups: Sequence[Sequence[Path]]) -> Iterator[list[EncodedImage]]:
        """Yield the embedded images group by group.

        Meanwhile the next group is read, so memory holds two groups, and the last one is stored in the cache.
        """
        # Each reading thread computes without helpers: threads that wait for each other by spinning slow down all others.
        with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            coming = [pool.submit(self.read, file) for file in groups[0]] if groups else []
            stored: list[Future[None]] = []
            for position in range(len(groups)):
                seen = [reading.result() for reading in coming]
                following = groups[position + 1] if position + 1 < len(groups) else []
                coming = [pool.submit(self.read, file) for file in following]
                for one in stored:
                    one.result()
                stored = self._embed(seen, pool)
                yield seen
            for one in stored:
                one.result()

    def read(self, file: Path) -> EncodedImage:
        """Read a file: its embeddings from the cache, and the prepared image for each other encoder."""
        try:
            if not file.is_file():  # to open a pipe would block
                return EncodedImage(failure="not a regular file")
            content = file.read_bytes()
            seen = EncodedImage(hashlib.sha256(content).hexdigest())
            for name in self.encoders:
                known = self.cache.read(self.keys[name], seen.digest)
                if known is not None:
                    seen.feature[name] = torch.from_numpy(known.copy())
            if unknown := self.encoders.keys() - seen.feature.keys():
                seen.prepared = self._prepared(pil_to_tensor(read_picture(content, self.max_pixels)), unknown)
        except UnreadableImageError as error:
            return EncodedImage(failure=str(error))
        except OSError as error:
            return EncodedImage(failure=f"{type(error).__name__}: {error}")
        return seen

    def _prepared(self, image_3HW: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """The image for each of some encoders. Those with equal preprocessing share it, as CLIP and LongCLIP do."""
        prepared: dict[str, Tensor] = {}
        made: dict[Preprocessing, Tensor] = {}
        for name in names:
            encoder = self.encoders[name]
            if not isinstance(encoder, Tower):
                prepared[name] = image_3HW
                continue
            rule = encoder.preprocessing
            if rule not in made:
                made[rule] = encoder.prepare(image_3HW)
            prepared[name] = made[rule]
        return prepared

    @torch.inference_mode()
    def _embed(self, everything: list[EncodedImage], pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Embed what is not embedded yet. What is new is stored by the pool, a batch at a time."""
        stored = []
        for name in self.encoders:
            by_shape: dict[tuple[int, ...], list[EncodedImage]] = defaultdict(list)
            for seen in everything:
                if name in seen.prepared:
                    by_shape[tuple(seen.prepared[name].shape)].append(seen)
            for alike in by_shape.values():
                for first in range(0, len(alike), self.batch_size):
                    batch = alike[first : first + self.batch_size]
                    self._embed_batch(name, batch)
                    stored.append(pool.submit(self._store, name, batch))
        return stored

    def _embed_batch(self, name: str, alike: list[EncodedImage]) -> None:
        encoder = self.encoders[name]
        images_NCHW = torch.stack([seen.prepared.pop(name) for seen in alike]).to(self.device)
        if isinstance(encoder, Tower):
            features_ND = encoder.embed_prepared(images_NCHW).cpu()
        else:
            features_ND = encoder.embed(images_NCHW.float() / 255).cpu()
        for seen, feature_D in zip(alike, features_ND, strict=True):
            seen.feature[name] = feature_D.clone()

    def _store(self, name: str, batch: list[EncodedImage]) -> None:
        """Write embeddings of an encoder to the cache, except those with NaN or infinity."""
        for seen in batch:
            feature_D = np.asarray(seen.feature[name])
            if np.isfinite(feature_D).all():
                self.cache.write(self.keys[name], seen.digest, feature_D)
