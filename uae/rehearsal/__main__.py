"""``python -m uae.rehearsal FOLDER``: stand-ins for every checkpoint that a configuration names."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

from uae.rehearsal.catalog import PIPELINE_NAMES, write


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, write, and say what can be run now."""
    parser = argparse.ArgumentParser(
        prog="python -m uae.rehearsal",
        description="Write tiny random checkpoints in official layouts, under official names, so that every configuration "
        "runs on a laptop before it runs on a GPU.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where they go; UAE_CHECKPOINTS of the run")
    example = f"e.g. UAE {next(iter(PIPELINE_NAMES))}"
    parser.add_argument("--only", metavar="NAME", nargs="+", help=f"these instead of all, {example}")
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        quiet()
        write(given.folder, given.only, print)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    size = sum(file.stat().st_size for file in given.folder.rglob("*") if file.is_file()) / 1e6
    print(f"{given.folder}: {size:.1f} MB in {time.perf_counter() - start:.0f} s. A rehearsal is the run with one more file:")
    print(
        f"UAE_CHECKPOINTS={given.folder} python -m uae.cli fit --config configs/uae.yaml --config configs/debug/rehearsal.yaml"
    )


def quiet() -> None:
    """No progress bars and no deprecations of the libraries: every stand-in has its own line."""
    import diffusers
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
