"""Notebooks run from top to bottom, show what they promise, and are light."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def ratio_is_one(printed: str) -> bool:
    return float(printed.split("largest |ratio - 1|:")[1].split()[0]) < 1e-5


def run_has_a_page(printed: str) -> bool:
    charts, pictures = re.findall(r"(\d+) charts, (\d+) pictures", printed)[0]
    return int(charts) >= 9 and int(pictures) == 3 * 6 and "report.html" in printed


def complete_captions_win(printed: str) -> bool:
    complete, terse = (float(mean) for mean in re.findall(r"\| overall \| (\S+) \|", printed))
    return complete > terse + 20


def a_mistake_is_red_and_mended(printed: str) -> bool:
    rows = re.findall(r"captions: ratio, float32 +(\S+) <= 0.0001  (\w+)", printed)
    failed = [int(count) for count in re.findall(r"(\d+) failed,", printed)]
    (change,) = re.findall(r"largest change of a weight: (\S+)", printed)
    (gap,) = re.findall(r"policy/sampler_gap +(\S+)", printed)
    return [verdict for _, verdict in rows] == ["failed", "passed"] and failed == [2, 0] and float(change) > 1e-4 > float(gap)


def images_are_captioned_and_scored(printed: str) -> bool:
    return "12 captions and reconstructions" in printed and "12 pairs" in printed and "score.html" in printed


SHOWN = {
    "01_one_rollout_by_hand": ratio_is_one,
    "02_read_a_training_run": run_has_a_page,
    "03_unified_bench": complete_captions_win,
    "04_bring_your_own_model": a_mistake_is_red_and_mended,
    "05_your_own_images": images_are_captioned_and_scored,
}


def printed_by(notebook: Any) -> str:
    return "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert SHOWN[path.stem](printed_by(notebook))
    assert path.stat().st_size < 100_000
    assert not re.search(r"/(?:tmp|home|root)/", path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert SHOWN[path.stem](printed_by(notebook))
