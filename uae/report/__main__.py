"""``python -m uae.report RUN ...`` writes ``report.html`` into the folders of runs, also of those that were stopped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from uae.report.run_page import write_run_page

USAGE = "usage: python -m uae.report RUN [RUN ...]   (folders of runs, like outputs/tiny)"


def main(args: Sequence[str] | None = None) -> None:
    """Write the pages.

    Args:
        args: Folders; None takes those of the process.
    """
    folders = sys.argv[1:] if args is None else list(args)
    if not folders or any(folder.startswith("-") for folder in folders):
        print(USAGE)
        raise SystemExit(0 if set(folders) & {"-h", "--help"} else 2)
    for folder in folders:
        try:
            print(write_run_page(Path(folder)))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None


if __name__ == "__main__":
    main()
