from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.encoders import folders
from tests.encoders.test_huggingface import photo
from uae.encoders import HFEncoder, OpenCLIPEncoder, similarity
from uae.encoders.preprocessing import Preprocessing
from uae.encoders.tower import Tower
from uae.rewards import EncoderSimilarity
from uae.weights.placement import Placement

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    root = tmp_path_factory.mktemp("towers")
    file = folders.register_open_clip(root / "open_clip")[1]
    clip, dinov3 = folders.clip(root / "clip"), folders.dinov3(root / "dinov3")
    return {
        "clip": lambda **more: HFEncoder(clip, **more),
        "dinov3": lambda **more: HFEncoder(dinov3, "cls", **more),
        "open_clip": lambda **more: OpenCLIPEncoder("tiny-clip-quickgelu", str(file), **more),
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["clip", "dinov3", "open_clip"])
@torch.no_grad()
def test_half_precision_is_close_and_identity_still_scores_one(make, name, dtype):
    images = photo() / 255
    exact, half = make[name](), make[name](placement=Placement(dtype=dtype))
    expected, embedding = exact.embed(images), half.embed(images)
    assert {p.dtype for p in half._loaded.module.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in exact._loaded.module.parameters()} == {torch.float32}
    assert embedding.dtype is torch.float32
    assert similarity(embedding, expected).min() > 0.999
    assert not torch.equal(embedding, expected)
    assert similarity(expected[:1], expected[1:]) < 0.999  # the bound means something
    reward = EncoderSimilarity(half)(images, images.repeat_interleave(3, 0), [""] * 6)
    assert (reward - 1).abs().max() < 1e-6
    for buffer_name, buffer in half._loaded.module.named_buffers():  # rotary frequencies
        assert torch.equal(buffer, exact._loaded.module.get_buffer(buffer_name)), buffer_name


def test_a_half_precision_tower_passes_gradients_to_the_images(make):
    gradients = []
    for dtype in ("float32", "bfloat16"):
        images = (photo() / 255).requires_grad_()
        make["open_clip"](placement=Placement(dtype=dtype)).embed(images)[:, 0].sum().backward()
        gradients.append(images.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_only_equal_placements_share_a_module(make):
    first, second = make["clip"](placement=Placement("bfloat16")).load(), make["clip"](placement=Placement()).load()
    assert first._loaded is second._loaded
    others = [Placement("float32"), Placement("bfloat16", "cpu"), Placement("bfloat16", offload=True)]
    modules = [make["clip"](placement=placement).load()._loaded for placement in others]
    assert len({id(loaded) for loaded in (first._loaded, *modules)}) == 4


def test_eight_bits_are_refused_in_one_line():
    for encoder in (lambda p: HFEncoder("a/b", placement=p), lambda p: OpenCLIPEncoder("hf-hub:a/b", placement=p)):
        with pytest.raises(ValueError, match="allowed.*float32, bfloat16, float16; set .*placement.dtype") as error:
            encoder(Placement("float8"))
        assert "\n" not in str(error.value)


class Moving(nn.Linear):
    """Can leave the meta device, which stands in for an accelerator; its values do not matter."""

    def to(self, device):
        return self.to_empty(device=device)


class Watched(Tower):
    """Notes where the weights and the pixels are while it computes."""

    def __init__(self, placement):
        super().__init__(placement)
        self.seen = []

    def weights(self):
        return "watched"

    def read(self):
        return Moving(1, 1), Preprocessing(None, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def features(self, module, pixels_NCHW):
        self.seen.append((module.weight.device.type, pixels_NCHW.device.type, pixels_NCHW.dtype))
        return torch.ones(len(pixels_NCHW), 4, dtype=pixels_NCHW.dtype)


@pytest.fixture
def meta_works(monkeypatch):
    """The meta device takes part in everything but autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.usefixtures("meta_works")
@pytest.mark.parametrize(
    ("placement", "policy", "waits", "works"),
    [
        (Placement("float32"), "cpu", "cpu", "cpu"),
        (Placement("float32"), "meta", "meta", "meta"),
        (Placement("bfloat16", device="meta"), "cpu", "meta", "meta"),
        (Placement("float32", device="cpu"), "meta", "cpu", "cpu"),
        (Placement("bfloat16", offload=True), "meta", "cpu", "meta"),
        (Placement("float32", device="meta", offload=True), "cpu", "cpu", "meta"),
    ],
)
def test_waits_and_works_where_it_is_placed(placement, policy, waits, works):
    encoder = Watched(placement).load(policy)
    dtype = torch.bfloat16 if placement.dtype == "bfloat16" else torch.float32
    for _ in range(2):
        assert encoder._loaded.module.weight.device.type == waits
        embedding = encoder.embed(torch.rand(2, 3, 4, 4))
        assert embedding.dtype is torch.float32
        assert embedding.device.type == "cpu"  # where the images are
    assert encoder.seen == [(works, works, dtype)] * 2
    assert encoder._loaded.module.weight.device.type == waits


@pytest.mark.usefixtures("meta_works")
def test_a_gradient_through_offloaded_weights_is_refused():
    encoder = Watched(Placement("float32", offload=True)).load("meta")
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"gradient.*init_args.placement.offload to false"):
        encoder.embed(images)
    with torch.no_grad():
        encoder.embed(images)
    assert len(encoder.seen) == 1


@torch.no_grad()
def test_names_are_looked_up_below_the_mirror(make, tmp_path, monkeypatch):
    """Hub ids and relative files find tiny stand-ins, and share their module with the spelled-out path."""
    images = photo() / 255
    file = make["open_clip"]().pretrained
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/clip").symlink_to(make["clip"]().path)
    (tmp_path / "owner/long.pt").symlink_to(file)
    monkeypatch.setenv("UAE_CHECKPOINTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    expected, mirrored = make["clip"]().load(), HFEncoder("owner/clip").load()
    assert mirrored._loaded is expected._loaded
    expected, mirrored = make["open_clip"]().load(), OpenCLIPEncoder("tiny-clip-quickgelu", "owner/long.pt").load()
    assert mirrored._loaded is expected._loaded
    assert torch.equal(mirrored.embed(images), expected.embed(images))
