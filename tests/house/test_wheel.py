"""What a user installs: the wheel has the licence, the weights and the configurations, and runs in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from uae import __version__

ROOT = Path(__file__).parents[2]
PARTS = ("uae", "callbacks", "configs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves folders beside the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        (source / part).symlink_to(ROOT / part)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, check=True, capture_output=True, timeout=200)
    (file,) = target.glob(f"uae-{__version__}-*.whl")
    return file


def test_the_wheel_has_all_that_a_run_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
        metadata = archive.read(f"uae-{__version__}.dist-info/METADATA").decode()
    wanted = [*(ROOT / "uae").rglob("*"), *(ROOT / "callbacks").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    names = [str(path.relative_to(ROOT)) for path in wanted if path.is_file() and path.suffix not in {".pyc"}]
    assert [name for name in names if f"uae/{name}" not in found and name not in found] == []
    assert "uae/configs/finetune/full.yaml" in found
    assert f"uae-{__version__}.dist-info/licenses/LICENSE" in found
    assert not [name for name in found if name.split("/")[0] not in {"uae", "callbacks", f"uae-{__version__}.dist-info"}]
    assert "License-Expression: Apache-2.0" in metadata


@pytest.mark.slow
def test_the_miniature_trains_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment, which sees the libraries of this one but not its `uae`, and an empty folder."""
    venv.create(tmp_path / "fresh", with_pip=False)
    (site,) = (tmp_path / "fresh/lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])  # editable installs there are not seen
    (tmp_path / "empty").mkdir()
    python, environment = tmp_path / "fresh/bin/python", {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(python), "-m", "uae.doctor"], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"uae {__version__}" in done.stdout
    assert "the miniature took two steps" in done.stdout  # `fit` with packaged configurations, in a folder of its own
    assert not list((tmp_path / "empty").iterdir())
