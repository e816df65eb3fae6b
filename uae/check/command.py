"""``python -m uae.check SYSTEM.yaml [SYSTEM.yaml ...] [--config more.yaml ...] [--key value ...] [--json FILE]``.

Every SYSTEM.yaml is a complete run, as ``python -m uae.cli fit --config`` takes it; further files and options override parts of each.
The exit status is 0 if every check passed or is not applicable, 1 if one failed, 2 if a system could not be built.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uae.check.parts.verdicts import Found
from uae.check.system import check
from uae.cli import CLI, fail, one_line_errors
from uae.module import UnifiedGRPO

WIDTH, NUMBER, BOUND = 36, 10, 9  # characters of the first three columns


class Configured(CLI):
    """The module and the data of ``fit``. No trainer is made and nothing is run."""

    trainer_settings: Mapping[str, Any]

    def instantiate_trainer(self, **kwargs: object) -> None:  # type: ignore[override]  # Lightning only keeps what this returns
        """Keep the settings of the trainer, which would claim every device."""
        self.trainer_settings = self._get(self.config_init, "trainer")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def configured(words: Sequence[str]) -> tuple[UnifiedGRPO, Any, Mapping[str, Any]]:
    """Module, data and trainer settings of a run.

    Args:
        words: The words behind ``python -m uae.cli fit``.

    Raises:
        ValueError: The configuration is that of another kind of module.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        parsed = Configured(["fit", *words])
    if not isinstance(parsed.model, UnifiedGRPO):
        raise ValueError(
            f"model={type(parsed.model).__name__}, but uae.check is about systems that learn from rewards; give a complete run of "
            "uae.module.UnifiedGRPO (configs/*.yaml)"
        )
    return parsed.model, parsed.datamodule, parsed.trainer_settings


def main(args: Sequence[str] | None = None) -> None:
    """Check systems, print a row per check, and exit.

    Args:
        args: Command-line arguments; None reads them from ``sys.argv``.
    """
    systems, words, target = understood(list(sys.argv[1:] if args is None else args))
    _without_progress_bars()
    with one_line_errors("make room or correct --json"):
        report: dict[str, dict[str, Any]] = {}
        for system in systems:
            print(f"{system}\n{heading()}", flush=True)
            found = check(*configured(["--config", system, *words]), show=show)
            report[system] = {name: plain(one) for name, one in found.items()}
            print(f"{counted(found)}\n", flush=True)
        if target:
            Path(target).write_text(json.dumps(report, indent=1) + "\n")
    failed = any(one["verdict"] == "failed" for found in report.values() for one in found.values())
    raise SystemExit(int(failed))


def _without_progress_bars() -> None:
    """Keep the libraries from drawing theirs between the rows of the table."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def understood(args: list[str]) -> tuple[list[str], list[str], str | None]:
    """The systems, the words that hold for all of them, and the file of the report or None."""
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    first = next((n for n, word in enumerate(args) if word.startswith("--")), len(args))
    systems, words, target = args[:first], args[first:], None
    if not systems:
        fail(f"no system before {args[0]!r}; give a complete run first: python -m uae.check configs/tiny.yaml")
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--json=") else [word])]
    if "--json" in words:
        at = words.index("--json")
        if at + 1 == len(words):
            fail("--json needs a file")
        target = words[at + 1]
        words = words[:at] + words[at + 2 :]
        if not Path(target).parent.is_dir():
            fail(f"--json {target!r}: there is no folder {str(Path(target).parent)!r}; give a file in an existing one")
    return systems, words, target


def plain(found: Found) -> dict[str, Any]:
    """A finding as JSON takes it: a number that is none becomes null."""
    measured = found.measured if math.isfinite(found.measured) else None
    return {"measured": measured, "bound": found.bound, "verdict": found.verdict, "reason": found.reason}


def heading() -> str:
    """The first line of the table."""
    return f"  {'check':{WIDTH}} {'measured':>{NUMBER}} {'bound':>{BOUND}}  verdict"


def show(name: str, found: Found | None) -> None:
    """Print the row of a check, or, on a terminal, the name of the one that runs."""
    if found is None:
        if sys.stderr.isatty():
            print(f"  {name} ...", end="\r", file=sys.stderr, flush=True)
        return
    number = "" if math.isnan(found.measured) else f"{found.measured:.3g}"
    reason = f": {found.reason}" if found.reason else ""
    print(f"  {name:{WIDTH}} {number:>{NUMBER}} {found.bound:>{BOUND}}  {found.verdict}{reason}", flush=True)


def counted(found: Mapping[str, Found]) -> str:
    """How many checks there are of every verdict; and where to look if one failed."""
    counts = Counter(one.verdict for one in found.values())
    advice = "; docs/checking.md says what to do" if counts["failed"] else ""
    return f"  {counts['passed']} passed, {counts['failed']} failed, {counts['not applicable']} not applicable{advice}"
