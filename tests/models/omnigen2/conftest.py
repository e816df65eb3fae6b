import pytest

from uae.rehearsal.catalog import write

OFFICIAL, CLIP = "OmniGen2/OmniGen2", "openai/clip-vit-large-patch14"


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder with a tiny OmniGen2 in the official layout, and the encoder of its reward."""
    there = tmp_path_factory.mktemp("hub")
    write(there, [OFFICIAL, CLIP])
    return there


@pytest.fixture(scope="session")
def folder(hub):
    return hub / OFFICIAL


@pytest.fixture
def run_here(hub, monkeypatch, tmp_path):
    """An empty folder in which commands find the checkpoints by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.setenv("UAE_CHECKPOINTS", str(hub))
