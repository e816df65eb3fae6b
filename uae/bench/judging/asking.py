"""Sending the requests of a plan to judges: several at a time, each until it has one answer, within a cost limit."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from uae.bench.fingerprints import sha256
from uae.bench.judging.cache import AnswerCache
from uae.bench.judging.clients import Answer, Client, Failure, JudgeClient
from uae.bench.judging.judges import Judge, Vendor
from uae.bench.judging.requests import JudgeRequest, JudgingPlan

HOPELESS = (401, 402, 403, 404)  # no key, no money, no permission, no such model: this run sends the judge nothing more
STRIKES = 5  # after so many failed requests in a row this run sends the judge nothing more


@dataclass
class Budget:
    """The cost limit of a run.

    Args:
        cap: Most that may be spent, in USD.
        spent: Amount spent so far, in USD.
        promised: Amount that the calls under way can cost at most, in USD.
        under_way: Number of calls under way.
        empty: Whether a call did not fit any more; no further call is made then.
    """

    cap: float
    spent: float
    promised: float = 0.0
    under_way: int = 0
    empty: bool = False
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def promise(self, usd: float) -> bool:
        """Reserve the most that a call can cost; wait for calls under way if that may help. False if the call does not fit."""
        async with self._changed:
            while self.spent + self.promised + usd > self.cap and self.under_way and not self.empty:
                await self._changed.wait()
            if self.empty or self.spent + self.promised + usd > self.cap + 1e-12:
                self.empty = True
                self._changed.notify_all()
                return False
            self.promised += usd
            self.under_way += 1
            return True

    async def pay(self, promised: float, usd: float) -> None:
        """Replace the amount reserved for a call, ``promised``, by its real cost ``usd``, when the call is over."""
        async with self._changed:
            self.under_way -= 1
            self.promised = self.promised - promised if self.under_way else 0.0
            self.spent += usd
            self._changed.notify_all()


@dataclass
class JudgingRun:
    """One run that sends the requests of a plan which have no answer yet.

    Args:
        plan: Requests and judges.
        cache: File of answers; its ``writing()`` must be entered while `run` runs.
        max_cost_usd: Most that all requests of the plan may cost in USD, earlier runs included.
        retry_errors: Whether to send a request again that another model answered than the one that was asked.
        client: Makes the client of a judge.
        calls: Number of calls made by this run.
        failures: One line for each failed request.
        closed: Judge to the reason why this run sends it nothing more.
        strikes: Judge to its number of failed requests in a row.
    """

    plan: JudgingPlan
    cache: AnswerCache
    max_cost_usd: float
    retry_errors: bool = False
    client: Callable[[Judge], JudgeClient] = Client
    calls: int = 0
    failures: list[str] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)
    strikes: Counter[str] = field(default_factory=Counter)

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
            self._check_money(pending, spent)
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

    def _check_money(self, pending: list[JudgeRequest], spent: float) -> None:
        least = min(self.most_usd(request) for request in pending)
        if spent + least > self.max_cost_usd:
            raise ValueError(
                f"--max_cost_usd {self.max_cost_usd:g} is too small for one more call, which can cost {least:.4f} USD "
                f"({spent:.4f} USD are spent); all calls cost about {sum(map(self.usual_usd, pending)):.2f} USD: raise --max_cost_usd"
            )

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
            while asked and request.judge not in self.closed and not self._settled(request):
                asked = await self._ask(request, clients[request.judge], budget)
            bar.update()
            bar.set_postfix_str(f"{budget.spent:.4f} USD")

    async def _ask(self, request: JudgeRequest, client: JudgeClient, budget: Budget) -> bool:
        """Send a request until an answer comes: True if the judge's model answered, False after a failure or without money."""
        judge, most = self._judge(request), self.most_usd(request)
        image = None if request.image is None else Path(request.image).read_bytes()
        for attempt in range(judge.retries + 1):
            if not await budget.promise(most):
                return False
            self.calls += 1
            came: Answer | Failure
            came, cost = Failure("interrupted", None, again=False, paid=True, pause=None), most
            try:
                came = await client.complete(*self._texts(request), image)
            finally:  # also when it is cancelled
                cost = self._keep(request, came, most)
                await budget.pay(most, cost)
            if isinstance(came, Answer):
                return came.model is None or judge.accepts(came.model)
            pause = _pause(judge, attempt, came.pause)
            if not came.again or pause > judge.longest_pause * 1.25 or attempt == judge.retries:
                self._strike(request.judge, came.message, closing=came.status in HOPELESS)
                return False
            await asyncio.sleep(pause)
        return False

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
            self.strikes[judge.name] = 0
            self.cache.append(**note, text=came.text, cost_usd=cost)
        else:
            swap = f"asked {judge.model}, answered {came.model}"
            self.cache.append(**note, error=swap, cost_usd=cost)
            self._strike(judge.name, swap, closing=False)
        return cost

    def _strike(self, judge: str, why: str, closing: bool) -> None:
        self.failures.append(f"judge {judge}: {why}")
        self.strikes[judge] += 1
        if closing or self.strikes[judge] >= STRIKES:
            self.closed[judge] = why


def _pause(judge: Judge, attempt: int, asked: float | None) -> float:
    """Seconds before the next try, with jitter so that calls are not repeated at the same moment; never less than the server asked."""
    if asked is not None:
        return asked * random.uniform(1.0, 1.25)
    return min(judge.longest_pause, judge.first_pause * 2.0**attempt) * random.uniform(0.5, 1.0)
