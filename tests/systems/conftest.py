"""Tiny random checkpoints in the official layouts, written once per session."""

import pytest

from uae.systems.rehearsal.catalog import write


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder laid out like the hub; also what UAE_CHECKPOINTS names while a test runs (see `mirrored`)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder)
    return folder


@pytest.fixture
def mirrored(checkpoints, monkeypatch):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(checkpoints))
    return checkpoints
