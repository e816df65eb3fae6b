"""Drawing the captions of a folder that have no picture yet: each once, several at a time, within a cost limit."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from uae.bench.drawing.client import DrawingClient, ImageClient, Received, Refused
from uae.bench.drawing.image_model import ImageModel
from uae.bench.generate import Drawing, png
from uae.bench.vendors.attempts import Attempts, PaidCall
from uae.bench.vendors.budget import Budget, check_money
from uae.bench.vendors.clients import Failure
from uae.bench.vendors.records import Records
from uae.files.whole import write_whole

EMPTY = "the caption is empty"


@dataclass
class DrawingRun:
    """One run that draws the captions which have no picture yet.

    A picture is on the disk before its record is. So a run that is started again finds every picture that was paid, whenever the
    one before it was killed, but for those of calls that were under way.

    Args:
        model: The model that draws.
        drawings: All pictures that are wanted; those of equal captions are drawn once and copied.
        drawn: File to the prompt it was drawn from, for the files that exist; kept up to date.
        records: File of records; its ``writing()`` must be entered while `run` runs.
        claim: Called before anything is kept of a call: from then on the folder is the model's.
        max_cost_usd: Most that all calls in the file of records may cost in USD.
        retry_failed: Whether to ask again for captions that were refused, or that were paid without a picture.
        client: Makes the client of a model.
        attempts: The calls made by this run.
        failed: Caption to the reason why it has no picture and will not get one by another try.
    """

    model: ImageModel
    drawings: Sequence[Drawing]
    drawn: dict[Path, str | None]
    records: Records
    claim: Callable[[], None]
    max_cost_usd: float
    retry_failed: bool = False
    client: Callable[[ImageModel], DrawingClient] = ImageClient
    attempts: Attempts = field(default_factory=Attempts)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files: dict[str, list[Path]] = {}
        for drawing in self.drawings:
            self.files.setdefault(drawing.prompt, []).append(drawing.path)
        self.failed |= {prompt: EMPTY for prompt in self.files if not prompt.strip()}
        for prompt in self.files:
            reasons = [record.get("refused") or record.get("failed") for record in self.records.records.get(self._key(prompt), ())]
            if not self.retry_failed and any(reasons) and self._picture(prompt) is None:
                self.failed[prompt] = next(reason for reason in reversed(reasons) if reason)

    @property
    def spent(self) -> float:
        """Cost of all calls in the file of records, in USD, and of pictures whose records a kill has prevented."""
        return self.records.spent(list(self.records.records)) + self.model.usd_per_image * len(self._unrecorded())

    def pending(self) -> list[str]:
        """Captions that no picture is drawn from yet, and that have not failed."""
        return [prompt for prompt in self.files if prompt not in self.failed and self._picture(prompt) is None]

    def left(self) -> list[Drawing]:
        """Pictures that are neither there nor failed."""
        return [each for each in self.drawings if self.drawn.get(each.path) != each.prompt and each.prompt not in self.failed]

    def estimate(self) -> str:
        """What there is to do and what it costs."""
        pending = len(self.pending())
        usd = pending * self.model.usd_per_image
        there = sum(self.drawn.get(each.path) == each.prompt for each in self.drawings)
        lines = [
            f"{len(self.drawings)} captions, {len(self.files)} of them different: {there} images are there, {len(self.failed)} "
            f"captions have failed, {pending} to draw with {self.model.model}: {usd:.2f} USD at {self.model.usd_per_image:g} USD "
            f"each; {self.spent:.2f} USD are spent, --max_cost_usd is {self.max_cost_usd:g}"
        ]
        if self.spent + usd > self.max_cost_usd + 1e-9:
            lines.append("--max_cost_usd is less: the run will stop part-way; run again with more to continue")
        return "\n".join(lines)

    def prepared(self) -> DrawingClient | None:
        """The client, if there is something to draw; None if there is not.

        Raises:
            ValueError: The key or the library is missing, or ``max_cost_usd`` is too small for one call.
        """
        pending, price = len(self.pending()), self.model.usd_per_image
        if not pending:
            return None
        check_money(self.max_cost_usd, self.spent, price, price * pending)
        return self.client(self.model)

    def run(self, client: DrawingClient | None) -> None:
        """Draw what is pending; returns when each caption has a picture or has failed, or when the money is spent."""
        for key in self._unrecorded():
            self.records.append(key=key, found="a picture whose call has no record", cost_usd=self.model.usd_per_image)
        for prompt in self.files:
            if (there := self._picture(prompt)) is not None:
                self._put(prompt, there.read_bytes())
        if client is not None:
            asyncio.run(self._draw_all(client))

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self.model.identity, prompt], sort_keys=True).encode()).hexdigest()

    def _picture(self, prompt: str) -> Path | None:
        """A file that is drawn from a prompt."""
        return next((file for file in self.files[prompt] if self.drawn.get(file) == prompt), None)

    def _unrecorded(self) -> list[str]:
        """Keys of the prompts whose picture is there, but no record of a call that made it."""
        keys = [self._key(prompt) for prompt in self.files if self._picture(prompt) is not None]
        return [key for key in keys if not any({"drawn", "found"} & record.keys() for record in self.records.records.get(key, ()))]

    def _put(self, prompt: str, content: bytes) -> None:
        """Write the picture of a prompt to all files that are to have it and do not."""
        for file in self.files[prompt]:
            if self.drawn.get(file) != prompt:
                write_whole(file, content)
                self.drawn[file] = prompt

    async def _draw_all(self, client: DrawingClient) -> None:
        queue, budget = deque(self.pending()), Budget(self.max_cost_usd, self.spent)

        async def work() -> None:
            while queue and not budget.empty and self.model.name not in self.attempts.closed:
                await self._draw(queue.popleft(), client, budget)
                bar.update()
                bar.set_postfix_str(f"{budget.spent:.4f} USD")

        with tqdm(total=len(queue), desc="drawing", unit="image") as bar:
            try:
                await asyncio.gather(*[work() for _ in range(self.model.concurrency)])
            finally:
                await client.close()

    async def _draw(self, prompt: str, client: DrawingClient, budget: Budget) -> None:
        def call() -> Awaitable[Received | Refused | Failure]:
            return client.draw(prompt)

        def keep(came: Received | Refused | Failure) -> float:
            return self._keep(prompt, came)

        asked = PaidCall[Received | Refused](self.model.usd_per_image, call, keep)
        came = await self.attempts.answer(self.model, budget, asked)
        given_up = self.model.name in self.attempts.closed
        if isinstance(came, Refused) or (isinstance(came, Failure) and not came.again and not given_up):
            self.failed[prompt] = came.message

    def _keep(self, prompt: str, came: Received | Refused | Failure) -> float:
        """Write a picture, then the record of its call; returns the cost of the call in USD."""
        price = self.model.usd_per_image
        note: dict[str, Any] = {"key": self._key(prompt), "file": self.files[prompt][0].name, "model": self.model.model}
        note["at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if isinstance(came, Failure) and not came.paid:
            return 0.0
        self.claim()
        if isinstance(came, Failure):
            self.records.append(**note, **{"lost" if came.again else "failed": came.message}, cost_usd=price)
            return price
        self.attempts.strikes[self.model.name] = 0
        if isinstance(came, Refused):
            self.records.append(**note, refused=came.message, cost_usd=0.0)
            return 0.0
        self._put(prompt, png(came.picture, prompt))
        self.records.append(**note, drawn=True, revised_prompt=came.revised_prompt, cost_usd=price)
        return price
