"""``python -m uae.rehearsal FOLDER``: writes a tiny stand-in for every checkpoint that a configuration names.

``UAE_DEBUG=1`` shows tracebacks.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

from uae.rehearsal.catalog import PIPELINE_NAMES, write


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, write the stand-ins, and print the command of a rehearsal.

    Args:
        arguments: Command-line arguments; None reads them from ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m uae.rehearsal",
        description="Write tiny random checkpoints in official layouts, under official names, so that every configuration "
        "runs on a laptop before it runs on a GPU.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of the stand-ins; the run's UAE_CHECKPOINTS")
    example = f"e.g. UAE {next(iter(PIPELINE_NAMES))}"
    parser.add_argument("--only", metavar="NAME", nargs="+", help=f"write these instead of all, {example}")
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        quiet()
        write(given.folder, given.only, print)
    except (ValueError, OSError) as error:
        if os.environ.get("UAE_DEBUG"):
            raise
        place = "; give another FOLDER, or make room" if isinstance(error, OSError) and error.errno is not None else ""
        sys.exit(f"error: {error}{place}")
    size = sum(file.stat().st_size for file in given.folder.rglob("*") if file.is_file()) / 1e6
    print(f"{given.folder}: {size:.1f} MB in {time.perf_counter() - start:.0f} s. A rehearsal is the run with one more file:")
    print(f"UAE_CHECKPOINTS={given.folder} python -m uae.cli fit --config configs/uae.yaml --config configs/debug/rehearsal.yaml")


def quiet() -> None:
    """Switch off progress bars and warnings of the libraries, so that each stand-in prints one line."""
    import diffusers
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
