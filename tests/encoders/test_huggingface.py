import gc
import pickle
from copy import deepcopy

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

from tests.encoders import folders
from uae.encoders import HFEncoder
from uae.types import ImageEncoder

torch.set_num_threads(1)


def photo(height=47, width=62, count=2, seed=0):
    """Smooth colour plus edges, 8 bit, off-square with odd margins: what resizing and cropping can get wrong."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 8, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    image[:, :, ::9] = 1.0
    return (image * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: getattr(folders, name)(root / name) for name in ("clip", "clip_vision", "dinov2", "dinov3")}


def official(path, feature, images):
    """Unified-Bench's way: the model's own processor on 8-bit images, then projection or class token."""
    pixels = AutoImageProcessor.from_pretrained(path)(list(images), return_tensors="pt")["pixel_values"]
    if path.endswith("clip_vision"):
        model = CLIPVisionModelWithProjection.from_pretrained(path).eval()
        return pixels, model(pixels).image_embeds if feature == "projection" else model(pixels).last_hidden_state[:, 0]
    model = AutoModel.from_pretrained(path).eval()
    if feature == "projection":
        return pixels, model.visual_projection(model.vision_model(pixels).pooler_output)
    return pixels, getattr(model, "vision_model", model)(pixels).last_hidden_state[:, 0]


@pytest.mark.parametrize("size", [(47, 62), (90, 40), (20, 20), (28, 28)])
@pytest.mark.parametrize(
    ("name", "feature"),
    [("clip", "projection"), ("clip", "cls"), ("clip_vision", "projection"), ("dinov2", "cls"), ("dinov3", "cls")],
)
@torch.no_grad()
def test_matches_the_official_processor_and_model(models, name, feature, size):
    images = photo(*size)
    pixels, expected = official(models[name], feature, images)
    encoder = HFEncoder(models[name], feature).load()
    std = torch.tensor(encoder._loaded.preprocessing.std).view(3, 1, 1)
    difference = (encoder._loaded.preprocessing(images / 255) - pixels) * std  # back in [0, 1] units
    assert difference.abs().max() < 1e-2
    embedding = encoder.embed(images / 255)
    assert (1 - cosine_similarity(embedding, expected)).abs().max() < 1e-3
    # The bound means something: two different images are further apart than that.
    assert 1 - cosine_similarity(expected[:1], expected[1:]) > 3e-3


@torch.no_grad()
def test_equal_weights_are_one_module_while_somebody_uses_them(models):
    reward, metric = HFEncoder(models["clip"]).load(), HFEncoder(models["clip"], "cls").load()
    assert reward._loaded.module is metric._loaded.module
    assert HFEncoder(models["dinov2"], "cls").load()._loaded.module is not reward._loaded.module

    images = photo() / 255
    for copy in (deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert "_loaded" not in vars(copy)
        torch.testing.assert_close(copy.embed(images), reward.embed(images))
        assert copy._loaded is reward._loaded
    assert len(pickle.dumps(reward)) < 1000

    from uae.encoders.tower import _LOADED

    before = len(_LOADED)
    del reward, metric, copy
    gc.collect()
    assert len(_LOADED) < before


def test_frozen_fp32_whatever_surrounds_the_first_use(models):
    """Loaded inside validation, under bf16 defaults and autocast, a tower must still serve a later backward pass."""
    images = photo() / 255
    expected = HFEncoder(models["dinov2"], "cls").embed(images)
    gc.collect()
    encoder = HFEncoder(models["dinov2"], "cls")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.device("meta"):
            encoder.load("cpu")
    finally:
        torch.set_default_dtype(torch.float32)

    parameters = list(encoder._loaded.module.parameters())
    assert not encoder._loaded.module.training
    assert all(p.dtype is torch.float32 and not p.requires_grad and not p.is_inference() for p in parameters)
    images.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        embedding = encoder.embed(images)
    torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-6)
    embedding.square().sum().backward()
    assert images.grad.abs().max() > 0


def test_satisfies_the_protocol_and_stores_arguments_only(models):
    assert isinstance(HFEncoder("no/such-model"), ImageEncoder)
    with pytest.raises(ValueError, match="float images"):
        HFEncoder(models["clip"]).embed(photo())


def test_errors_name_the_key(models, tmp_path):
    with pytest.raises(ValueError, match=r"feature='mean'.*init_args.feature"):
        HFEncoder("x", "mean")
    with pytest.raises(ValueError, match="no image projection.*init_args.feature"):
        HFEncoder(models["dinov2"], "projection").embed(photo() / 255)
    with pytest.raises(FileNotFoundError, match="nothing at.*init_args.path") as missing:
        HFEncoder(str(tmp_path / "nothing")).load()
    with pytest.raises((FileNotFoundError, ValueError), match="init_args.path") as empty:
        HFEncoder(str(tmp_path)).load()
    assert "\n" not in str(missing.value) + str(empty.value)


def test_weights_that_would_stay_random_are_refused(models, tmp_path):
    """A vision tower saved without its projection loads with a warning only; its cosines would be noise."""
    model = CLIPVisionModelWithProjection.from_pretrained(models["clip_vision"])
    state = {key: value for key, value in model.state_dict().items() if "visual_projection" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    AutoImageProcessor.from_pretrained(models["clip_vision"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 weights \(visual_projection.weight"):
        HFEncoder(str(tmp_path)).load()
