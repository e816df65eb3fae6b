"""A worked example: a new data module in two classes, used by its class path. It reads images from a .npy file."""

from pathlib import Path

import numpy as np
import torch

from uae import cli
from uae.data import ImageData

ROOT = Path(__file__).parents[2]


class ArraySource:
    """Images uint8 ``[N, H, W, 3]`` of a file that is mapped into memory."""

    def __init__(self, file):
        self.images = np.load(file, mmap_mode="r")

    def __len__(self):
        return len(self.images)

    def __getitems__(self, positions):
        image = torch.from_numpy(self.images[positions]).movedim(3, 1) / 255
        names = [f"image {position}" for position in positions]
        return {"image": image, "id": torch.tensor(positions), "name": names}, {}  # none of them is unreadable


class ArrayData(ImageData):
    """Images of one .npy file, in training and in validation.

    Args:
        file: The path of the file.
        batch_size: Images per batch and process.
    """

    def __init__(self, file: str, batch_size: int = 2) -> None:
        super().__init__(batch_size, eval_batch_size=batch_size, seed=0, num_workers=0)
        self.file = file

    def source(self, stage):
        return ArraySource(self.file)


DELTA = """
data:
  class_path: tests.data.test_toy_source.ArrayData
  init_args:
    file: images.npy
model:
  init_args:
    metrics: null  # those of tiny.yaml need the ground truth of scenes
"""


def test_a_run_trains_on_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8))
    (tmp_path / "array.yaml").write_text(DELTA)
    files = [ROOT / "configs/tiny.yaml", ROOT / "configs/debug/fast.yaml", ROOT / "tests/untrained.yaml", "array.yaml"]
    words = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]  # two steps are one rollout of one batch
    run = cli.main(["fit", *(f"--config={file}" for file in files), *words])
    assert run.trainer.callback_metrics["unified_score/n"] == 4
    first, second = run.model.experience.id_B.tolist()
    assert {first, second} < {0, 1, 2, 3}
