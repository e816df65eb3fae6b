"""``python -m uae.doctor``: is this machine ready? ``python -m uae.doctor RUN_FOLDER``: what is wrong with this run?

The status is 1 if something is wrong. ``UAE_DEBUG=1`` shows tracebacks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from uae.cli import one_line_errors
from uae.doctor.finding import Finding


def main(arguments: list[str] | None = None) -> int:
    """Look at the machine or at a run, and print one finding after the other.

    Args:
        arguments: Command-line arguments; None reads them from ``sys.argv``.

    Returns:
        1 if something is wrong, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m uae.doctor",
        description="Say what is wrong with this machine, or with a run, and what to change. The status is 1 if something is wrong.",
    )
    parser.add_argument("run", metavar="RUN_FOLDER", nargs="?", type=Path, help="folder of a run, such as outputs/tiny")
    parser.add_argument("--skip_rollout", action="store_true", help="do not try the miniature, which takes ten seconds or more")
    given = parser.parse_args(arguments)
    with one_line_errors():
        faults = 0
        for finding in of_run(given.run) if given.run else of_machine(with_rollout=not given.skip_rollout):
            print(finding, flush=True)
            faults += finding.state == "wrong"
    print(f"\nfaults: {faults}")
    return int(faults > 0)


def of_machine(with_rollout: bool) -> Iterator[Finding]:
    """The findings about this machine.

    Args:
        with_rollout: Whether the miniature is tried.
    """
    from uae.doctor.machine import check_machine
    from uae.doctor.trial import check_rollout
    from uae.doctor.versions import check_versions
    from uae.doctor.weights import check_weights

    yield from check_versions()
    yield from check_machine()
    yield from check_weights()
    if with_rollout:
        yield check_rollout()


def of_run(folder: Path) -> Iterator[Finding]:
    """The findings about a run.

    Args:
        folder: Its folder.
    """
    from uae.doctor.history import check_history
    from uae.doctor.run_folder import read_run
    from uae.doctor.signs import check_numbers

    run = read_run(folder)
    yield from check_history(run)
    yield from check_numbers(run)


if __name__ == "__main__":
    sys.exit(main())
