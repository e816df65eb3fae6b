import io
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from callbacks.panels import RolloutPanels, markdown, panel
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
    images = events.Images("panel/rollouts")
    assert [image.step for image in images] == [0, 3, 4]
    first, *_, last = [picture(image) for image in images]
    assert first.shape[2] == (4 + 1) * (TILE + 8)  # the source and a group of four
    expected = pil_to_tensor(
        to_pil_image(next(iter(SceneData(val_size=8).val_dataloader()))["image"][0]).resize((TILE, TILE), 0)
    )
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


def test_every_tile_is_its_reconstruction(experience):
    batch, experience = experience
    image = panel(batch["image"], experience, columns=2)
    height = image.shape[1] // 2
    assert height >= TILE + 2 * LINE
    for b in range(2):
        for g in range(2):  # of three: columns limits them
            expected = to_pil_image(experience.reconstructions_NCHW[b * 3 + g]).resize(
                (TILE, TILE), Image.Resampling.NEAREST
            )
            left = (g + 1) * (TILE + 8)
            assert torch.equal(image[:, b * height : b * height + TILE, left : left + TILE], pil_to_tensor(expected))
            text = image[:, b * height + TILE : (b + 1) * height, left : left + TILE]
            assert (text < 128).any()  # something is written
    assert image.shape[2] == 3 * (TILE + 8)


def test_no_caption_breaks_the_table(experience):
    _, experience = experience
    nasty = ["a | b", "line\nbreak\r\nagain", "<script>", "", "\\", "tab\there"]
    rows = markdown(replace(experience, rollout=replace(experience.rollout, texts=nasty))).splitlines()
    assert len(rows) == 2 + 6
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert "<" not in "".join(rows)


def test_without_a_logger_nothing_happens(build, trainer):
    run = trainer(callbacks=[RolloutPanels()], limit_val_batches=1, num_sanity_val_steps=0)
    run.fit(build(), SceneData(batch_size=2, train_size=4, val_size=2))
    assert run.global_step == 1


def test_settings_are_checked():
    with pytest.raises(ValueError, match="columns=0"):
        RolloutPanels(columns=0)
