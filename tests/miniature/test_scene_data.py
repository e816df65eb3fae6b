import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uae.miniature.data import SceneData
from uae.miniature.scenes import Object, Scene, detect, parse, render, word_of
from uae.miniature.scenes.world import COLUMNS
from uae.miniature.tiny import WordFidelity


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
    assert batch["name"] == [f"train-{i}" for i in batch["id"].tolist()]


def test_scenes_that_carry_words():
    batch = next(iter(SceneData(batch_size=64, words=True).train_dataloader()))
    assert detect(batch["image"]) == batch["scene"]
    words = [word_of(scene) for scene in batch["scene"]]
    assert {len(word) for word in words} == {3}
    assert set("".join(words)) == set("IOXA")
    for scene, caption in zip(batch["scene"], batch["caption"], strict=True):
        assert parse(caption) == scene
        assert len({(obj.row, obj.color, obj.size) for obj in scene.objects}) == 1
        assert [obj.column for obj in scene.objects] == ["left", "center", "right"]


def test_the_fidelity_of_words_counts_the_letters_that_differ():
    def word(shapes, row="top"):
        objects = (Object(row, column, "red", shape, "tiny") for column, shape in zip(COLUMNS, shapes, strict=True))
        return Scene("black", tuple(objects))

    source = word(("ring", "cross", "triangle"))
    redrawn = [source, word(("ring", "cross", "square"), "bottom"), Scene("gray", source.objects[:2]), Scene("black", ())]
    rewards = WordFidelity()(render([source, word(("ring", "ring", "ring"))]), render(redrawn), ["a"] * 4)
    torch.testing.assert_close(rewards, torch.tensor([[1.0, 2 / 3], [1 / 3, 0.0]]))


def test_an_id_is_the_same_scene_whatever_the_batch_and_the_order():
    first = dict(everything(SceneData(batch_size=8, train_size=24).train_dataloader()))
    assert first == dict(everything(SceneData(batch_size=3, train_size=24).train_dataloader()))


def test_no_split_no_loader():
    assert SceneData(val_size=0).val_dataloader() == []
