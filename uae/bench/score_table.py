"""A result as a user reads it: Markdown, times 100."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 5


def score_table(result: Mapping[str, Any], notes: Mapping[str, Sequence[str]] | None = None) -> str:
    """The scores of one result with their 95 % intervals, and below them what was left out.

    Args:
        result: What `uae.bench.result.write_result` returns.
        notes: Title to names, of which the first few are shown; empty ones are not.
    """
    lines = [f"## {result['benchmark']}: {result['system']}", "", "| | score | 95 % | n |", "|---|---|---|---|"]
    for name, one in result["scores"].items():
        interval = f"{one['low'] * 100:.1f} to {one['high'] * 100:.1f}"
        lines.append(f"| {name} | {one['value'] * 100:.2f} | {interval} | {one['n']} |")
    for title, names in (notes or {}).items():
        if names:
            lines += ["", f"{len(names)} {title}: {'; '.join(names[:SHOWN])}{'; ...' * (len(names) > SHOWN)}"]
    return "\n".join(lines)
