"""Results of benchmarks as pages: the same numbers as the tables, the right pairs, and names that stay text."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.report.markup import EVIL, Page
from uae.bench.__main__ import main
from uae.bench.result import read_result

ENCODERS = "layout: {class_path: uae.encoders.LayoutEncoder}\nheld_out: [layout]\n"
NAMES = ["a.png", "b.png", EVIL.replace("/", "|") + ".png"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two systems: of one, the second pair is not alike; its captions and the last name are markup."""
    root = tmp_path_factory.mktemp("bench")
    (root / "encoders.yaml").write_text(ENCODERS)
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 255, (40, 40, 3), dtype=np.uint8) for _ in NAMES]
    for folder in ("sources", "same", EVIL.replace("/", "|")):
        (root / folder).mkdir()
        for n, (name, picture) in enumerate(zip(NAMES, pictures, strict=True)):
            other = folder not in ("sources", "same") and n == 1
            Image.fromarray(255 - picture if other else picture).save(root / folder / name)
    files = []
    for n, folder in enumerate(("same", EVIL.replace("/", "|"))):
        rows = [{"name": name, "id": 0, "caption": f"{EVIL} {name}", "reconstruction": name} for name in NAMES]
        (root / folder / "captions.json").write_text(json.dumps(rows))
        files.append(root / f"{n}.json")
        words = {"sources": root / "sources", "reconstructions": root / folder, "output": files[-1]}
        words["encoders"] = root / "encoders.yaml"
        main(["score", *(f"--{key}={value}" for key, value in words.items()), "--cache=false", "--resamples=50"])
    return files


def test_a_score_shows_its_pairs_with_captions(results):
    page = Page(results[1].with_suffix(".html").read_text())
    page.check()
    assert len(page.addresses) == 2 * len(NAMES)
    shown = [text for text in page.texts if text.strip()]
    assert any(EVIL.replace("/", "|") in text for text in shown)
    worst = shown.index("The worst pairs")
    assert "b.png" in shown[worst:][:4]
    assert f"{EVIL} b.png" in shown
    scores = read_result(results[1])["scores"]
    assert f"{100 * scores['overall']['value']:.2f}" in shown
    assert f"{100 * scores['overall']['low']:.2f} to {100 * scores['overall']['high']:.2f}" in shown


def test_a_report_shows_its_table_and_every_contact_sheet(results, tmp_path):
    main(["report", *map(str, results), "--output", str(tmp_path / "report.html")])
    page = Page((tmp_path / "report.html").read_text())
    page.check()
    assert len(page.addresses) == len(results)
    values = [read_result(file)["scores"]["overall"]["value"] for file in results]
    assert all(any(text.startswith(f"{100 * value:.2f} [") for text in page.texts) for value in values)
