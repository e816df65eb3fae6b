import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.bench.understanding import seeing
from uae.bench.geneval import detection
from uae.bench.geneval.colors import ColorReader, check_activation, cut_out
from uae.bench.geneval.detection import Mask2Former, extent, instances, scaled
from uae.bench.geneval.rules import COLORS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mirror")
    seeing.mask2former(folder / seeing.MASK2FORMER)
    return folder


@pytest.fixture
def detector(folder, monkeypatch):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(folder))
    monkeypatch.setattr(detection, "SHORT", 100)
    monkeypatch.setattr(detection, "LONG", 170)
    return Mask2Former()


def picture(width, height, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


# -------------------------------------------------------------------------------- post-processing, query by query


def plain(classes_QK, masks_Qhw, padded, resized, original, least, most):
    """The rule from its description, one (query, class) pair at a time."""
    pairs = []
    for query, logits in enumerate(classes_QK):
        probabilities = logits.exp() / logits.exp().sum()
        pairs += [(p.item(), query, kind) for kind, p in enumerate(probabilities[:-1])]
    found = []
    for probability, query, kind in sorted(pairs, reverse=True)[:most]:
        mask = F.interpolate(masks_Qhw[None, query : query + 1], size=padded, mode="bilinear")
        mask = F.interpolate(mask[:, :, : resized[0], : resized[1]], size=original, mode="bilinear")[0, 0]
        ys, xs = np.nonzero(mask.numpy() > 0)
        if not len(ys):
            continue
        inside = [1 / (1 + np.exp(-mask[y, x].item())) for y, x in zip(ys, xs, strict=True)]
        score = probability * np.mean(inside)
        if score > least:
            found.append((kind, score, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), len(ys)))
    return sorted(found)


@pytest.mark.parametrize("original", [(31, 57), (64, 20), (1, 1), (33, 33)])
def test_instances_are_those_of_a_plain_loop(original):
    draw = torch.Generator().manual_seed(sum(original))
    classes_QK, masks_Qhw = torch.randn(30, 6, generator=draw) * 3, torch.randn(30, 16, 24, generator=draw) - 1
    masks_Qhw[3] = -5  # empty: nothing is there, however sure the class
    sizes = (64, 96), (57, 83)
    seen = instances(classes_QK, masks_Qhw, *sizes, original, 0.2, most=40)
    rows = zip(seen.labels_M.tolist(), seen.scores_M.tolist(), seen.boxes_M4.int().tolist(), seen.masks_MHW, strict=True)
    mine = sorted((label, score, tuple(box), int(mask.sum())) for label, score, box, mask in rows)
    expected = plain(classes_QK, masks_Qhw, *sizes, original, 0.2, 40)
    assert [(label, box, area) for label, _, box, area in mine] == [(label, box, area) for label, _, box, area in expected]
    assert [row[1] for row in mine] == pytest.approx([row[1] for row in expected], abs=1e-5)
    assert len(mine) > (10 if original != (1, 1) else 0)
    assert seen.masks_MHW.shape[1:] == original


def test_nothing_found_has_shapes():
    seen = instances(torch.zeros(4, 81), torch.ones(4, 8, 8), (32, 32), (32, 32), (10, 12), 0.3)
    assert (seen.boxes_M4.shape, seen.masks_MHW.shape) == ((0, 4), (0, 10, 12))


def test_padding_is_cut_off_before_resizing():
    masks = torch.full((1, 8, 16), -9.0)
    masks[:, :, :8] = 9.0  # the left half of the padded input ...
    seen = instances(torch.tensor([[9.0, 0.0, -9.0]]), masks, (32, 64), (32, 40), (40, 50), 0.3)
    assert extent(seen.masks_MHW[0]).tolist() == [0, 0, 40, 40]  # ... is 32 of 40 columns of the image


def test_sizes():
    assert scaled(512, 512) == (800, 800)
    assert scaled(1024, 512) == (1333, 667)  # the long side decides
    assert scaled(480, 640) == (800, 1067)
    assert scaled(1, 5000) == (1, 1333)


# ---------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize(("width", "height"), [(97, 61), (61, 97), (300, 41), (128, 128)])
def test_a_checkpoint_in_the_official_layout_runs_on_odd_sizes(detector, width, height):
    image = picture(width, height)
    seen = detector(image)
    assert seen.masks_MHW.shape == (len(seen.labels_M), height, width)
    assert len(seen.labels_M) > 0
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    size = scaled(height, width)
    levels = F.interpolate(levels, size, mode="bilinear", antialias=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    pad = [(-side) % 32 for side in size]
    pixels = F.pad((levels - mean) / std, (0, pad[1], 0, pad[0]))
    with torch.no_grad():
        out = detector.model(pixel_values=pixels)
    expected = plain(
        out.class_queries_logits[0], out.masks_queries_logits[0], tuple(pixels.shape[2:]), size, (height, width), 0.3, 100
    )
    assert sorted(seen.labels_M.tolist()) == [label for label, *_ in expected]
    assert sorted(seen.scores_M.tolist()) == pytest.approx(sorted(row[1] for row in expected), abs=1e-4)


def test_a_detector_of_other_categories_is_refused(tmp_path):
    seeing.mask2former(tmp_path / "m", categories=133)
    with pytest.raises(ValueError, match="knows 133 categories, GenEval needs COCO's 80"):
        Mask2Former(str(tmp_path / "m"))


def test_a_missing_detector_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--detector|nothing at"):
        Mask2Former(str(tmp_path / "none"))


# -------------------------------------------------------------------------------------------------------- colors


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return seeing.color_clip(tmp_path_factory.mktemp("color"))


@torch.no_grad()
def test_colors_are_zero_shot_answers_about_objects_on_gray(clip):
    model, file = clip
    reader = ColorReader(seeing.COLOR_MODEL, str(file))
    image, draw = picture(90, 50), np.random.default_rng(1)
    masks = [draw.random((50, 90)) < 0.5 for _ in range(40)]
    boxes = [(x, y, x + int(draw.integers(5, 30)), y + int(draw.integers(5, 20))) for x, y in draw.integers(0, 40, (40, 2))]
    import open_clip

    words = open_clip.get_tokenizer(seeing.COLOR_MODEL)
    _, _, transform = open_clip.create_model_and_transforms(seeing.COLOR_MODEL)
    expected = []
    for (left, top, right, bottom), mask in zip(boxes, masks, strict=True):
        pixels = np.where(mask[..., None], np.array(image), 153).astype(np.uint8)
        feature = model.encode_image(transform(Image.fromarray(pixels).crop((left, top, right, bottom)))[None])[0]
        scores = []
        for color in COLORS:
            texts = [f"a photo of a {color} hot dog", f"a photo of a {color}-colored hot dog", f"a photo of a {color} object"]
            embeds = [model.encode_text(words([text]))[0] for text in texts]
            mean = sum(embed / embed.norm() for embed in embeds) / 3
            scores.append((feature @ mean / mean.norm() / feature.norm()).item())
        expected.append(COLORS[int(np.argmax(scores))])
    assert reader(image, boxes, masks, "hot dog") == expected
    assert len(set(expected)) > 1
    assert reader(image, [], [], "hot dog") == []


def test_an_object_alone():
    mask = np.zeros((4, 6), bool)
    mask[1, 2] = True
    cut = np.array(cut_out(Image.new("RGB", (6, 4), "red"), (2, 1, 4, 3), mask))
    assert cut.tolist() == [[[255, 0, 0], [153] * 3], [[153] * 3] * 2]


def test_gelu_is_refused_where_quickgelu_is_meant(tmp_path, clip):
    with pytest.raises(ValueError, match="set --color_model ViT-L-14-quickgelu"):
        ColorReader("ViT-L-14", "openai")
    model, _ = clip
    check_activation(model)
    model, file = seeing.color_clip(tmp_path / "gelu", quick_gelu=False)  # a name that lies
    try:
        with pytest.raises(ValueError, match="computes with GELU"):
            ColorReader(seeing.COLOR_MODEL, str(file))
    finally:
        seeing.color_clip(tmp_path / "again")
