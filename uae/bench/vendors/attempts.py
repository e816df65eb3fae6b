"""Calling a model until an answer comes, within a cost limit, and giving a model up that does not answer."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from uae.bench.vendors.budget import Budget
from uae.bench.vendors.clients import NO_MONEY, Failure
from uae.bench.vendors.endpoint import Endpoint

T = TypeVar("T")

HOPELESS = (401, 402, 403, 404)  # no key, no money, no permission, no such model: this run sends the model nothing more
STRIKES = 5  # after so many failed requests in a row this run sends the model nothing more


@dataclass(frozen=True)
class PaidCall(Generic[T]):
    """A call that may have to be repeated.

    Args:
        most_usd: Most that it can cost, in USD.
        make: Makes it.
        keep: Records what came of it, also when it was cancelled, and returns its cost in USD.
    """

    most_usd: float
    make: Callable[[], Awaitable[T | Failure]]
    keep: Callable[[T | Failure], float]


@dataclass
class Attempts:
    """The calls of one run.

    Args:
        calls: Number of calls made.
        failures: One line for each failed request.
        closed: Name of a model to the reason why this run sends it nothing more.
        strikes: Name of a model to its number of failed requests in a row.
    """

    calls: int = 0
    failures: list[str] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)
    strikes: Counter[str] = field(default_factory=Counter)

    async def answer(self, endpoint: Endpoint, budget: Budget, call: PaidCall[T]) -> T | Failure | None:
        """Call a model until an answer comes, or until no further try may help. None without money.

        Args:
            endpoint: The model.
            budget: Limit of what all calls may cost.
            call: The call.
        """
        came: T | Failure
        for attempt in range(endpoint.retries + 1):
            if not await budget.promise(call.most_usd):
                return None
            self.calls += 1
            came, cost = Failure("interrupted", None, again=True, paid=True, pause=None), call.most_usd
            try:
                came = await call.make()
            finally:  # also when it is cancelled
                cost = call.keep(came)
                await budget.pay(call.most_usd, cost)
            if not isinstance(came, Failure):
                return came
            pause = _pause(endpoint, attempt, came.pause)
            if not came.again or pause > endpoint.longest_pause * 1.25 or attempt == endpoint.retries:
                self.strike(endpoint, came.message, closing=came.status in HOPELESS or came.code in NO_MONEY)
                break
            await asyncio.sleep(pause)
        return came

    def strike(self, endpoint: Endpoint, why: str, closing: bool) -> None:
        """Count a failed request of a model.

        Args:
            endpoint: The model.
            why: Reason, in one line.
            closing: Whether further requests would fail as well.
        """
        self.failures.append(f"{endpoint.kind} {endpoint.name}: {why}")
        self.strikes[endpoint.name] += 1
        if closing or self.strikes[endpoint.name] >= STRIKES:
            self.closed[endpoint.name] = why


def _pause(endpoint: Endpoint, attempt: int, asked: float | None) -> float:
    """Seconds before the next try, with jitter so that calls are not repeated at the same moment; never less than the server asked."""
    if asked is not None:
        return asked * random.uniform(1.0, 1.25)
    return min(endpoint.longest_pause, endpoint.first_pause * 2.0**attempt) * random.uniform(0.5, 1.0)
