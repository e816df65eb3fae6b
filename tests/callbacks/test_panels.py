import io

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from callbacks.panels import RolloutPanels, panels, rows_of, spread
from uae.files.tiles import LINE, TILE
from uae.miniature.data import SceneData
from uae.rollout import roll_out


def picture(event):
    return pil_to_tensor(Image.open(io.BytesIO(event.encoded_image_string)))


@pytest.fixture
def experience(system, build):
    module = build()
    batch = next(iter(SceneData(batch_size=2, train_size=8).train_dataloader()))
    return batch, roll_out(system.build(), module.reward, batch, module.plan, 0)


def test_panels_show_the_same_sources_before_training_and_after(events):
    assert sorted(tag for tag in events.Tags()["images"] if tag.startswith("panel/")) == [f"panel/image_{n}" for n in (1, 2, 3, 4)]
    sources = next(iter(SceneData(val_size=8).val_dataloader()))["image"]
    for number in (1, 4):
        images = events.Images(f"panel/image_{number}")
        assert [image.step for image in images] == [0, 3, 4]
        first, *_, last = [picture(image) for image in images]
        assert first.shape[2] == 2 * (TILE + 8)  # as wide as TensorBoard shows it without enlarging
        expected = pil_to_tensor(to_pil_image(sources[number - 1]).resize((TILE, TILE), 0))
        assert torch.equal(first[:, :TILE, :TILE], expected)
        assert torch.equal(last[:, :TILE, :TILE], expected)
        assert not torch.equal(first, last)


def test_captions_are_a_table(events):
    for event in events.Tensors("panel/captions/text_summary"):
        rows = event.tensor_proto.string_val[0].decode().splitlines()
        assert len(rows) == 2 + 4 * 4  # head, images x group
        assert all(row.count("|") == 5 for row in rows)


def test_histograms_cover_the_training_rollout(events):
    for tag, low, high in (
        ("reward/histogram", -1, 1),
        ("advantage/histogram", -4, 4),
        ("caption/length_histogram", 1, 6),
    ):
        histogram = events.Histograms(tag)[0].histogram_value
        assert histogram.num == 2 * 4  # batch x group
        assert low <= histogram.min <= histogram.max <= high


def test_every_tile_is_its_reconstruction_from_the_best_to_the_worst(experience):
    batch, experience = experience
    pictures = panels(batch["image"], batch["name"], experience, shown=3)
    assert len(pictures) == 2
    for b, image in enumerate(map(pil_to_tensor, pictures)):
        height = image.shape[1] // 2
        assert height >= TILE + 2 * LINE
        order = sorted(range(3), key=lambda g: -float(experience.rewards.reward_BG[b, g]))  # noqa: B023
        for place, g in enumerate(order, 1):
            expected = to_pil_image(experience.reconstructions_NCHW[b * 3 + g]).resize((TILE, TILE), Image.Resampling.NEAREST)
            top, left = height * (place // 2), (TILE + 8) * (place % 2)
            assert torch.equal(image[:, top : top + TILE, left : left + TILE], pil_to_tensor(expected))
            assert (image[:, top + TILE : top + height, left : left + TILE] < 128).any()  # something is written


def test_some_of_a_group_are_spread_over_it():
    assert spread([5, 3, 1, 0, 2], 3) == [5, 1, 2]
    assert spread([5, 3], 3) == [5, 3]
    assert spread([5, 3], 1) == [5]


def test_the_table_names_images_as_the_panels_do(experience):
    batch, experience = experience
    rows = rows_of(batch["name"], experience)
    assert [row[0] for row in rows] == [f"{b + 1} ({batch['name'][b]})" for b in range(2) for _ in range(3)]
    assert [row[1] for row in rows] == experience.rollout.texts


def test_without_a_logger_nothing_happens(build, trainer):
    run = trainer(callbacks=[RolloutPanels()], limit_val_batches=1, num_sanity_val_steps=0)
    run.fit(build(), SceneData(batch_size=2, train_size=4, val_size=2))
    assert run.global_step == 1


def test_settings_are_checked():
    with pytest.raises(ValueError, match="shown=0"):
        RolloutPanels(shown=0)
