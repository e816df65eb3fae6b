"""A cost limit that calls share which are under way at the same time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

ROUNDING = 1e-9  # of sums of thousands of prices, in USD


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
            while self.spent + self.promised + usd > self.cap + ROUNDING and self.under_way and not self.empty:
                await self._changed.wait()
            if self.empty or self.spent + self.promised + usd > self.cap + ROUNDING:
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


def check_money(cap: float, spent: float, least: float, expected: float) -> None:
    """Refuse a cost limit that is too small for one more call.

    Args:
        cap: The limit, in USD.
        spent: Amount spent so far, in USD.
        least: Most that the cheapest of the calls can cost, in USD.
        expected: Estimated cost of all calls, in USD.
    """
    if spent + least > cap + ROUNDING:
        raise ValueError(
            f"--max_cost_usd {cap:g} is too small for one more call, which can cost {least:.4f} USD ({spent:.4f} USD are spent); "
            f"all calls cost about {expected:.2f} USD: raise --max_cost_usd"
        )
