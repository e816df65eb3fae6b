"""Captions that a server on this machine draws."""

from functools import partial

import pytest

from tests.bench.drawing.fake_images import CAPTIONS, PRICE, write_captions
from tests.bench.judging.fake_judges import SECRET
from uae.bench.drawing.command import draw
from uae.bench.drawing.image_model import ImageModel


@pytest.fixture
def drawing(tmp_path, monkeypatch):
    """Run the command at a server; ``captions`` are name to caption."""
    monkeypatch.setenv("FAKE_KEY", SECRET)
    monkeypatch.setattr("uae.bench.drawing.command.ImageModel", partial(ImageModel, first_pause=0.01))

    def run(server, captions=CAPTIONS, **changes):
        given = {"model": "painter-1", "output": str(tmp_path / "out"), "usd_per_image": PRICE, "max_cost_usd": 1.0}
        given |= {"base_url": f"{server.address}/v1", "key_env": "FAKE_KEY", "concurrency": 1, **changes}
        return draw(write_captions(tmp_path / "captions.json", captions), **given)

    return run
