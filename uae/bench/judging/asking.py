"""Sending the requests of a plan to judges: several at a time, each until it has one answer, within a cost limit."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from uae.bench.fingerprints import sha256
from uae.bench.judging.cache import AnswerCache
from uae.bench.judging.clients import Answer, Client, JudgeClient
from uae.bench.judging.judges import Judge
from uae.bench.judging.requests import JudgeRequest, JudgingPlan
from uae.bench.vendors.attempts import Attempts, PaidCall
from uae.bench.vendors.budget import Budget, check_money
from uae.bench.vendors.clients import Failure
from uae.bench.vendors.endpoint import Vendor


@dataclass
class JudgingRun:
    """One run that sends the requests of a plan which have no answer yet.

    Args:
        plan: Requests and judges.
        cache: File of answers; its ``writing()`` must be entered while `run` runs.
        max_cost_usd: Most that all requests of the plan may cost in USD, earlier runs included.
        retry_errors: Whether to send a request again that another model answered than the one that was asked.
        client: Makes the client of a judge.
        attempts: The calls made by this run.
    """

    plan: JudgingPlan
    cache: AnswerCache
    max_cost_usd: float
    retry_errors: bool = False
    client: Callable[[Judge], JudgeClient] = Client
    attempts: Attempts = field(default_factory=Attempts)

    def pending(self) -> list[JudgeRequest]:
        """Requests without an answer; equal requests are listed once."""
        unique = {request.key: request for request in self.plan.requests}
        return [request for request in unique.values() if not self._settled(request)]

    def run(self) -> None:
        """Send the pending requests; returns when each has an answer or has failed, or when the money is spent.

        Raises:
            ValueError: A key, a library or an image is missing, or ``max_cost_usd`` is too small for one call.
        """
        pending = self.pending()
        if pending:
            spent = self.cache.spent(request.key for request in self.plan.requests)
            self._check_images(pending)
            check_money(self.max_cost_usd, spent, min(map(self.most_usd, pending)), sum(map(self.usual_usd, pending)))
            clients = {name: self.client(self.plan.judges[name]) for name in {request.judge for request in pending}}
            asyncio.run(self._ask_all(pending, clients, spent))

    def most_usd(self, request: JudgeRequest) -> float:
        """Most that a call for a request can cost, in USD."""
        return self._judge(request).most_usd("".join(self._texts(request)), request.image is not None)

    def usual_usd(self, request: JudgeRequest) -> float:
        """Estimated cost of a call for a request, in USD."""
        return self._judge(request).usual_usd("".join(self._texts(request)), request.image is not None)

    def _judge(self, request: JudgeRequest) -> Judge:
        return self.plan.judges[request.judge]

    def _texts(self, request: JudgeRequest) -> tuple[str, str]:
        return self.plan.prompt.texts(request.given)

    def _settled(self, request: JudgeRequest) -> bool:
        swapped = bool(self.cache.errors(request.key)) and not self.retry_errors
        return swapped or self.cache.answer(request, self.plan.prompt) is not None

    def _check_images(self, pending: list[JudgeRequest]) -> None:
        digests = {request.image: request.image_sha256 for request in pending if request.image is not None}
        for path, expected in digests.items():
            if not Path(path).is_file() or sha256(path) != expected:
                raise ValueError(f"the image {path!r} has changed since the requests were built; build again")

    async def _ask_all(self, pending: list[JudgeRequest], clients: Mapping[str, JudgeClient], spent: float) -> None:
        budget = Budget(self.max_cost_usd, spent)
        queues: dict[Vendor, deque[JudgeRequest]] = defaultdict(deque)
        limits: dict[Vendor, int] = {}
        for request in pending:
            judge = self._judge(request)
            queues[judge.vendor].append(request)
            limits[judge.vendor] = min(limits.get(judge.vendor, judge.concurrency), judge.concurrency)
        with tqdm(total=len(pending), desc="judging", unit="request") as bar:
            work = [self._work(queue, clients, budget, bar) for vendor, queue in queues.items() for _ in range(limits[vendor])]
            try:
                await asyncio.gather(*work)
            finally:
                for client in clients.values():
                    await client.close()

    async def _work(self, queue: deque[JudgeRequest], clients: Mapping[str, JudgeClient], budget: Budget, bar: tqdm) -> None:
        while queue and not budget.empty:
            request = queue.popleft()
            asked = True
            while asked and request.judge not in self.attempts.closed and not self._settled(request):
                asked = await self._ask(request, clients[request.judge], budget)
            bar.update()
            bar.set_postfix_str(f"{budget.spent:.4f} USD")

    async def _ask(self, request: JudgeRequest, client: JudgeClient, budget: Budget) -> bool:
        """Send a request until an answer comes: True if the judge's model answered, False after a failure or without money."""
        judge, most = self._judge(request), self.most_usd(request)
        image = None if request.image is None else Path(request.image).read_bytes()

        def call() -> Awaitable[Answer | Failure]:
            return client.complete(*self._texts(request), image)

        def keep(came: Answer | Failure) -> float:
            return self._keep(request, came, most)

        came = await self.attempts.answer(judge, budget, PaidCall[Answer](most, call, keep))
        return isinstance(came, Answer) and (came.model is None or judge.accepts(came.model))

    def _keep(self, request: JudgeRequest, came: Answer | Failure, most: float) -> float:
        """Record an answer or a failure, and return its cost in USD."""
        judge = self._judge(request)
        note: dict[str, Any] = {"key": request.key, "judge": judge.name, "asked": judge.model}
        note["at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if isinstance(came, Failure):
            if came.paid:
                self.cache.append(**note, lost=came.message, cost_usd=most)
            return most if came.paid else 0.0
        cost = most if came.input_tokens is None or came.output_tokens is None else judge.usd(came.input_tokens, came.output_tokens)
        note |= {"answered": came.model, "input_tokens": came.input_tokens, "output_tokens": came.output_tokens}
        if came.model is None or judge.accepts(came.model):
            self.attempts.strikes[judge.name] = 0
            self.cache.append(**note, text=came.text, cost_usd=cost)
        else:
            swap = f"asked {judge.model}, answered {came.model}"
            self.cache.append(**note, error=swap, cost_usd=cost)
            self.attempts.strike(judge, swap, closing=False)
        return cost
