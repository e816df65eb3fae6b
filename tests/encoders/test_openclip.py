import json

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.nn.functional import cosine_similarity

from tests.encoders import folders
from tests.encoders.test_huggingface import photo
from uae.encoders import OpenCLIPEncoder

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return folders.register_open_clip(tmp_path_factory.mktemp("open_clip") / "configs")


def official(model, images):
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    pixels = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    return pixels, model.encode_image(pixels)


@pytest.mark.parametrize("size", [(47, 62), (91, 40), (28, 28)])
@torch.no_grad()
def test_matches_the_official_transform_and_model(tiny, size):
    model, file = tiny
    images = photo(*size)
    pixels, expected = official(model, images)
    encoder = OpenCLIPEncoder("tiny-clip-quickgelu", str(file)).load()
    difference = encoder._loaded.preprocessing(images / 255) - pixels
    assert (difference * torch.tensor(encoder._loaded.preprocessing.std).view(3, 1, 1)).abs().max() < 1e-2
    embedding = encoder.embed(images / 255)
    assert (1 - cosine_similarity(embedding, expected)).abs().max() < 1e-3
    assert 1 - cosine_similarity(expected[:1], expected[1:]) > 3e-3


@torch.no_grad()
def test_local_dir_and_longclip_file_give_the_same_image_tower(tiny, tmp_path):
    model, file = tiny
    images = photo() / 255
    expected = OpenCLIPEncoder("tiny-clip-quickgelu", str(file)).embed(images)

    squash = {
        "size": [28, 28],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "resize_mode": "squash",
        "interpolation": "bilinear",
    }
    config = {"model_cfg": {**folders.TINY_OPEN_CLIP, "quick_gelu": True}, "preprocess_cfg": squash}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    squashed = OpenCLIPEncoder(f"local-dir:{tmp_path}").embed(images)
    by_hand = torch.nn.functional.interpolate(images, (28, 28), mode="bilinear", antialias=True)
    torch.testing.assert_close(squashed, model.encode_image((by_hand - 0.5) / 0.25))

    longer = model.state_dict() | {
        "positional_embedding_res": torch.zeros(248, 32),
        "positional_embedding": torch.ones(248, 32),
    }
    torch.save(longer, tmp_path / "longclip.pt")
    torch.testing.assert_close(OpenCLIPEncoder("tiny-clip-quickgelu", str(tmp_path / "longclip.pt")).embed(images), expected)
    with pytest.raises(ValueError, match="tiny-clip-quickgelu"):
        OpenCLIPEncoder("tiny-clip", str(tmp_path / "longclip.pt")).load()


def test_first_use_in_validation_under_a_bf16_default(tiny, tmp_path):
    """The weights must be exact, able to take part in a later backward pass, and cost no random number."""
    model, _ = tiny
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            encoder = OpenCLIPEncoder("tiny-clip-quickgelu", str(tmp_path / "weights.pt")).load()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in encoder._loaded.module.named_parameters():
        assert torch.equal(parameter, model.visual.get_parameter(name)), name
        assert not parameter.requires_grad
    images = (photo() / 255).requires_grad_()
    encoder.embed(images).square().sum().backward()
    assert images.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-L-14", "openai", "ViT-L-14-quickgelu"),  # open_clip 3 builds plain GELU and only warns
        ("ViT-L-14-quickgelu", "laion2b_s32b_b82k", "neither a file nor a tag"),
        ("ViT-L-14", "metaclip_400m", "init_args.name to 'ViT-L-14-quickgelu'"),
        ("ViT-L-14", "no/such/file.pt", "init_args.pretrained"),
        ("ViT-L-14", None, "init_args.pretrained"),
        ("no-such-model", "openai-file.pt", "init_args.name"),
        ("local-dir:/no/such/folder", None, "nothing at.*init_args.name"),
        ("local-dir:no/folder", None, "does not exist.*init_args.name"),
        ("local-dir:/no/such/folder", "openai", "must have none"),
    ],
)
def test_errors_name_the_key(name, pretrained, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        OpenCLIPEncoder(name, pretrained).load()
    assert "\n" not in str(error.value)
