import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uae.miniature.data import SceneData
from uae.miniature.scenes import detect


def everything(loader):
    return [image for batch in loader for image in zip(batch["id"].tolist(), batch["scene"], strict=True)]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.sampled_from([(1,), (1, 2, 3), (2, 3)]))
def test_splits_share_neither_scenes_nor_ids(seed, counts):
    data = SceneData(batch_size=10, train_size=40, val_size=20, test_size=20, counts=counts, seed=seed)
    splits = [everything(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert [len(split) for split in splits] == [40, 20, 20]
    for position in (0, 1):  # ids, scenes
        seen = [{image[position] for image in split} for split in splits]
        assert not seen[0] & seen[1]
        assert not seen[0] & seen[2]
        assert not seen[1] & seen[2]
    ids = [image[0] for split in splits for image in split]
    assert len(set(ids)) == len(ids)
    assert 0 <= min(ids) <= max(ids) < 2**48  # what metrics accept
    assert {len(scene.objects) for split in splits for _, scene in split} <= set(counts)


def test_a_batch_shows_its_scenes():
    batch = next(iter(SceneData(batch_size=16, seed=3).train_dataloader()))
    assert batch["image"].shape == (16, 3, 24, 24)
    assert batch["image"].dtype == torch.float32
    assert detect(batch["image"]) == batch["scene"]
    assert batch["id"].dtype == torch.int64
    assert batch["name"] == [f"scene-{i}" for i in batch["id"].tolist()]


def test_an_id_is_the_same_scene_whatever_the_batch_and_the_order():
    first = dict(everything(SceneData(batch_size=8, train_size=24).train_dataloader()))
    assert first == dict(everything(SceneData(batch_size=3, train_size=24).train_dataloader()))


def test_no_split_no_loader():
    assert SceneData(val_size=0).val_dataloader() == []
