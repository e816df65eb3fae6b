"""Renderers outside this process: a folder of existing images, or a program behind a Python function.

They return pixels without gradients. They can be used for evaluation and to train the captioner, but not to train a renderer.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from uae.files.lines import read_lines
from uae.files.pictures import UnreadableImageError, read_picture
from uae.models.conditioners.states import TextCondition
from uae.models.renderers.answers import PictureCache, as_pixels, picture_of
from uae.models.renderers.clients import KEY, client_name, import_client, one_line
from uae.types import Condition


class ExternalRenderer:
    """Base class of renderers outside this process; implements `uae.types.Renderer`.

    Args:
        height: Height of the returned images in pixels. Other sizes are resized without keeping their aspect ratio.
        width: Width of the returned images in pixels, likewise.
    """

    def __init__(self, height: int, width: int) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"height={height}, width={width}; allowed: 1 or more; set {KEY}.height and {KEY}.width")
        self.height, self.width = height, width
        self.device = torch.device("cpu")

    def check(self) -> None:
        """Raise early if nothing can be drawn. Called when the run is moved to its device."""
        raise NotImplementedError

    def pictures(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One RGB image of any size per row."""
        raise NotImplementedError

    def modules(self) -> list[nn.Module]:
        """An empty list: there are no networks in this process."""
        return []

    def to(self, device: Any) -> ExternalRenderer:
        """Return images on this device from now on, after `check`."""
        self.check()
        self.device = torch.device(device)
        return self

    def render(self, condition: Condition, seeds: Sequence[int], grad: bool = False) -> Tensor:
        """Images float32 ``[N, 3, height, width]`` in [0, 1].

        Args:
            condition: A `TextCondition` of N captions.
            seeds: N numbers.
            grad: Must be False, because there are no gradients.

        Raises:
            ValueError: ``grad`` is True, the condition is not text, or the numbers of captions and seeds differ.
        """
        name = type(self).__name__
        if grad:
            raise ValueError(
                f"{name} has no gradients, because its pictures come from outside; train without render gradients, or change "
                "model.init_args.system to a system that draws with a diffusers pipeline"
            )
        if not isinstance(condition, TextCondition):
            raise ValueError(
                f"{name} draws from captions (TextCondition), got {type(condition).__name__}; "
                "use uae.models.conditioners.states.TextConditioner as the conditioner of the system"
            )
        if len(seeds) != len(condition):
            raise ValueError(f"{len(condition)} conditions but {len(seeds)} seeds")
        images = [as_pixels(picture, self.height, self.width) for picture in self.pictures(condition.texts, seeds)]
        return torch.stack(images).to(self.device)


class FolderRenderer(ExternalRenderer):
    """Looks up existing images by caption.

    The folder is in Hugging Face's imagefolder layout: it has a ``metadata.jsonl`` with ``file_name`` (relative to the folder)
    and ``text`` (the exact caption) in each line. If a text has several files, the seed selects one of them.

    Args:
        folder: Folder of the images and their ``metadata.jsonl``.
        height: Height of the returned images in pixels, see `ExternalRenderer`.
        width: Width of the returned images in pixels, see `ExternalRenderer`.
    """

    def __init__(self, folder: str, height: int, width: int) -> None:
        super().__init__(height, width)
        self.folder = folder
        self._files: dict[str, list[Path]] | None = None

    def check(self) -> None:
        """Read ``metadata.jsonl``."""
        if self._files is None:
            self._files = _files_by_text(Path(self.folder).expanduser(), self.folder)

    def pictures(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One image per row.

        Raises:
            ValueError: A caption has no image, or a file cannot be read.
        """
        self.check()
        files = self._files or {}
        missing = list(dict.fromkeys(text for text in texts if text not in files))
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(set(texts))} captions have no picture in {self.folder!r}, e.g. "
                f"{', '.join(repr(text) for text in missing[:3])}; add them to its metadata.jsonl or change {KEY}.folder"
            )
        chosen = [files[text][seed % len(files[text])] for text, seed in zip(texts, seeds, strict=True)]
        opened: dict[Path, Image.Image] = {}
        for file in chosen:
            try:
                opened[file] = opened[file] if file in opened else read_picture(file)
            except UnreadableImageError as error:
                raise ValueError(f"{one_line(error)}: replace {file.name} in {self.folder!r} or change {KEY}.folder") from None
        return [opened[file] for file in chosen]


def _files_by_text(folder: Path, name: str) -> dict[str, list[Path]]:
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise FileNotFoundError(f"no metadata.jsonl in {name!r}; set {KEY}.folder to an imagefolder with one")
    files: dict[str, list[Path]] = {}
    for number, line in enumerate(read_lines(metadata), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, file = str(row["text"]), folder / row["file_name"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"line {number} of {name}/metadata.jsonl must be a JSON object with file_name and text; "
                f"correct it or change {KEY}.folder"
            ) from None
        files.setdefault(text, []).append(file)
    absent = [file.name for named in files.values() for file in named if not file.is_file()]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} files of {name}/metadata.jsonl are not there, e.g. {', '.join(absent[:3])}; "
            f"add them or change {KEY}.folder"
        )
    return files


class CallableRenderer(ExternalRenderer):
    """Draws with a Python function, e.g. the client of an HTTP service.

    Every image is cached on disk by its request, so no request is sent twice. This saves requests for equal captions with
    equal seeds, and in a run that is started again. The rate limit holds per process.

    Args:
        client: Function ``client(text, height, width, seed)`` that returns one image: the content of an image file (bytes),
            a PIL image, or a tensor ``[3, H, W]`` (uint8, or float in [0, 1]). It is called from several threads. Seeds have
            63 bits. Any exception counts as a failed try. In a configuration: its import path, "package.module:function".
        cache: Folder of the images. Runs and processes may share it.
        height: Height of the returned images in pixels, see `ExternalRenderer`.
        width: Width of the returned images in pixels, see `ExternalRenderer`; also passed to the client.
        retries: Number of further tries after a failed try, 0 or more. The pauses before them are 1, 2, 4, ... seconds.
        requests_per_minute: Limit on requests, failed tries included; None for no limit.
        workers: Number of simultaneous requests, 1 or more.
        version: Part of the cache's keys. Change it when the program behind the client changes.
        longest_pause: Longest pause between two tries, in seconds, 0 or more.

    Raises:
        ValueError: A number is out of its range, or the client has no unique name and there is no version.
    """

    def __init__(
        self,
        client: str | Callable[..., Any],
        cache: str,
        height: int,
        width: int,
        retries: int = 3,
        requests_per_minute: float | None = None,
        workers: int = 8,
        version: str = "",
        longest_pause: float = 60.0,
    ) -> None:
        super().__init__(height, width)
        least = {"retries": (retries, 0), "workers": (workers, 1), "longest_pause": (longest_pause, 0)}
        for key, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{key}={value}; allowed: {minimum} or more; set {KEY}.{key}")
        if requests_per_minute is not None and requests_per_minute <= 0:
            raise ValueError(
                f"requests_per_minute={requests_per_minute}; allowed: a positive number, or null for no limit; "
                f"set {KEY}.requests_per_minute"
            )
        self.client, self.version = client, version
        self.name = client_name(client, version)
        self.cache = PictureCache(cache)
        self.retries, self.workers, self.longest_pause = retries, workers, longest_pause
        self.interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._free_at = float("-inf")  # when the next request may start

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_free_at": float("-inf")}  # clocks of different machines cannot be compared

    def check(self) -> None:
        """Import the client.

        Raises:
            ValueError: It cannot be imported.
        """
        import_client(self.client)

    def pictures(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One image per row, from the cache or else from the client.

        Raises:
            RuntimeError: The client failed for some rows. The images of all other rows are in the cache.
            ValueError: The cache cannot be written.
        """
        rows = list(zip(texts, seeds, strict=True))
        unique = list(dict.fromkeys(rows))
        found = {row: kept for row in unique if (kept := self.cache.read(*self._key(*row))) is not None}
        missing = [row for row in unique if row not in found]
        if missing:
            self.cache.check_writable()
        errors = self._fetch(missing, found)
        if errors:
            raise RuntimeError(
                f"{len(errors)} of {len(unique)} pictures could not be had from the client {self.name!r} in "
                f"{self.retries + 1} tries each (first: {one_line(errors[0])}); the others are cached: run again, or change "
                f"{KEY}.client, .retries or .requests_per_minute"
            ) from errors[0]
        return [found[row] for row in rows]

    def _key(self, text: str, seed: int) -> tuple[str | int, ...]:
        return self.name, self.version, text, self.height, self.width, seed

    def _fetch(self, rows: list[tuple[str, int]], found: dict[tuple[str, int], Image.Image]) -> list[Exception]:
        """Request these rows and add their images to ``found``. Returns the errors of rows that failed."""
        from tqdm.auto import tqdm

        if not rows:
            return []
        client, turn, errors = import_client(self.client), threading.Lock(), []
        pool = ThreadPoolExecutor(min(self.workers, len(rows)))
        try:
            jobs = {pool.submit(self._ask, client, turn, *row): row for row in rows}
            for job in tqdm(as_completed(jobs), "pictures", len(jobs), leave=False, delay=5):  # shown after 5 s
                try:
                    found[jobs[job]] = job.result()
                except Exception as error:  # noqa: BLE001 - a client raises whatever it likes
                    errors.append(error)
        finally:
            pool.shutdown(cancel_futures=True)
        return errors

    def _ask(self, client: Callable[..., Any], turn: threading.Lock, text: str, seed: int) -> Image.Image:
        for attempt in range(self.retries + 1):
            self._wait(turn)
            try:
                picture = picture_of(client(text, self.height, self.width, seed))
                break
            except Exception:
                if attempt == self.retries:
                    raise
                time.sleep(min(2.0**attempt, self.longest_pause))
        self.cache.write(picture, *self._key(text, seed))
        return picture

    def _wait(self, turn: threading.Lock) -> None:
        """Sleep until the rate limit allows the next request."""
        if not self.interval:
            return
        with turn:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + self.interval
        if start > now:
            time.sleep(start - now)
