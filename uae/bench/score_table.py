"""One result as a Markdown table, scores multiplied by 100."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 5


def score_table(result: Mapping[str, Any], notes: Mapping[str, Sequence[str]] | None = None) -> str:
    """The scores of one result with their 95 % intervals, and notes below them.

    Args:
        result: Content of a result file, see `uae.bench.result.write_result`.
        notes: Title to names (of files that are missing, for instance); the first five of each title are shown. A title
            without names is left out.
    """
    lines = [f"## {result['benchmark']}: {result['system']}", "", "| | score | 95 % | n |", "|---|---|---|---|"]
    for name, one in result["scores"].items():
        interval = f"{one['low'] * 100:.1f} to {one['high'] * 100:.1f}"
        lines.append(f"| {name} | {one['value'] * 100:.2f} | {interval} | {one['n']} |")
    for title, names in (notes or {}).items():
        if names:
            lines += ["", f"{len(names)} {title}: {'; '.join(names[:SHOWN])}{'; ...' * (len(names) > SHOWN)}"]
    return "\n".join(lines)
