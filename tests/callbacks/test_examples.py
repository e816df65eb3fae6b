"""The same images before and after a run, in the run's folder."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from callbacks.checkpoint import RolloutCheckpoint
from callbacks.examples import Examples
from uae.checkpoints.files import CheckpointFiles
from uae.files.examples import SIDE, comparison, load, none, small
from uae.files.tiles import GAP, TILE
from uae.miniature.data import SceneData


def test_a_run_shows_the_first_images_before_and_after(run):
    kept = load(run.folder / "examples.pt")
    images = next(iter(SceneData(val_size=8).val_dataloader()))["image"][:6]
    with Image.open(run.folder / "examples.png") as written:
        picture = pil_to_tensor(written)
    height = picture.shape[1] // 6
    for time, left in (("before", TILE + GAP), ("after", 2 * (TILE + GAP))):
        assert torch.equal(torch.stack(kept[time]["source"]), (images * 255).round().to(torch.uint8))
        assert len(kept[time]["caption"]) == len(kept[time]["reconstruction"]) == 6
        for row, drawn in enumerate(kept[time]["reconstruction"]):
            shown = picture[:, row * height : row * height + TILE, left : left + TILE]
            corner = drawn[:, :1, :1].expand(-1, 3, 3)  # hard pixels, many times as large
            assert torch.equal(shown[:, :3, :3], corner)
    assert not all(map(torch.equal, kept["before"]["reconstruction"], kept["after"]["reconstruction"]))


def test_they_are_of_several_batches_and_a_resumed_run_keeps_the_start(build, trainer, tmp_path):
    def fit(steps):
        checkpoint = RolloutCheckpoint(1, save_last="link")
        run = trainer(
            callbacks=[Examples(3), checkpoint], enable_checkpointing=True, default_root_dir=tmp_path, plugins=[CheckpointFiles()],
            max_steps=steps, limit_val_batches=3, num_sanity_val_steps=-1, val_check_interval=1, check_val_every_n_epoch=None,
        )  # fmt: skip
        run.fit(build(), SceneData(batch_size=2, train_size=8, val_size=6, eval_batch_size=2), ckpt_path="last")
        return load(tmp_path / "examples.pt")

    first, second = fit(1), fit(2)
    assert [len(one["caption"]) for one in first.values()] == [3, 3]
    assert first["before"]["caption"] == second["before"]["caption"]  # there was no validation before the second part
    assert all(map(torch.equal, first["before"]["reconstruction"], second["before"]["reconstruction"]))


def test_large_images_are_kept_small_and_odd_ones_are_drawn():
    tall = torch.rand(3, 4 * SIDE, SIDE)
    tall[0, 0, 0] = torch.nan
    assert small(tall).shape == (3, SIDE, SIDE // 4)
    one = {"source": [small(tall)], "caption": [""], "reconstruction": [small(tall)]}
    assert comparison({"before": none(), "after": one}).width == 2 * (TILE + GAP)  # there was no validation before


def test_no_images_are_refused():
    with pytest.raises(ValueError, match=r"images=0 of callbacks\.examples\.Examples; allowed: 1 or more"):
        Examples(0)
