"""What holds for every reward that asks a frozen network: rows stand alone, broken images are missing, bad weights are one line."""

import copy
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from uae.encoders import HFEncoder
from uae.rehearsal.catalog import write
from uae.rewards import PerceptualSimilarity, PreferenceScore, RegionSimilarity, TextFidelity, VLMJudge
from uae.weights.placement import Placement

PICK, HPS, TROCR, GOT = "yuvalkirstain/PickScore_v1", "xswu/HPSv2", "microsoft/trocr-base-printed", "stepfun-ai/GOT-OCR-2.0-hf"
JUDGE, CLIP, ALEX = "OpenGVLab/InternVL3-2B-hf", "openai/clip-vit-large-patch14", "torchvision/alexnet-owt-7be5be79.pth"
MAKERS = {
    "pickscore": lambda **more: PreferenceScore(PICK, **more),
    "hpsv2": lambda **more: PreferenceScore(f"{HPS}/HPS_v2_compressed.pt", "ViT-H-14", **more),
    "trocr": lambda **more: TextFidelity(TROCR, max_tokens=12, **more),
    "got_ocr": lambda **more: TextFidelity(GOT, max_tokens=6, **more),
    "lpips": lambda **more: PerceptualSimilarity("lpips_alex", ALEX, side=64, **more),
    "judge": lambda **more: VLMJudge(JUDGE, **more),
    "regions": lambda rows=None: RegionSimilarity(HFEncoder(CLIP), tiles=2, temperature=0.1),
}
NETWORKS = [name for name in MAKERS if name != "regions"]
B, G = 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewards")
    write(root, [PICK, HPS, TROCR, GOT, JUDGE, CLIP, "torchvision"])
    return root


@pytest.fixture(autouse=True)
def mirror(folder, monkeypatch):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(folder))
    return folder


def batch(seed=0):
    """Coarse pictures that differ much, so that every model has another answer for each."""
    noise = torch.Generator().manual_seed(seed)
    coarse = torch.rand(B + B * G, 3, 4, 4, generator=noise).round()
    images = torch.nn.functional.interpolate(coarse, (40, 48))
    return images[:B], images[B:], [f"{'big ' * n}cat {n}" for n in range(B * G)]


@pytest.mark.parametrize("name", MAKERS)
def test_rows_stand_alone_whatever_their_order_and_number(name):
    sources, redrawn, texts = batch()
    reward = MAKERS[name]()
    scores = reward(sources, redrawn, texts)
    assert scores.shape == (B, G)
    assert scores.dtype is torch.float32
    assert not scores.requires_grad
    assert scores.flatten().unique().numel() >= 3
    one_by_one = [reward(sources[n // G][None], redrawn[n][None], [texts[n]]).item() for n in range(B * G)]
    torch.testing.assert_close(torch.tensor(one_by_one).view(B, G), scores, rtol=1e-5, atol=1e-5)
    order = [5, 3, 4, 2, 0, 1]  # other image first, other captions first
    turned = MAKERS[name](rows=4)(sources.flip(0), redrawn[order], [texts[n] for n in order])
    torch.testing.assert_close(turned.flatten(), scores.flatten()[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_a_broken_pixel_takes_its_own_row_only(name):
    sources, redrawn, texts = batch()
    reward = MAKERS[name]()
    scores = reward(sources, redrawn, texts)
    redrawn[4, 0, 1, 1] = torch.nan
    sources[0, 2, 5, 5] = torch.nan
    broken = reward(sources, redrawn, texts)
    assert broken.isnan().tolist() == [[True] * 3, [False, True, False]]
    torch.testing.assert_close(broken[1, ::2], scores[1, ::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "best"), [("trocr", 1.0), ("got_ocr", 1.0), ("lpips", 0.0), ("regions", 1.0)])
def test_an_equal_image_is_worth_the_most(name, best):
    sources, redrawn, texts = batch()
    reward = MAKERS[name]()
    copies = sources.repeat_interleave(G, 0)
    assert (reward(sources, copies, texts) - best).abs().max() < 1e-5
    others = reward(sources, redrawn, texts)
    assert (others < best + 1e-5).all()
    assert others.min() < best - 0.01


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_shared_frozen_and_never_copied(name):
    first, second = MAKERS[name]().load(), MAKERS[name]().load("cpu")
    assert first._loaded is second._loaded
    assert not any(weight.requires_grad for weight in first._loaded.network.parameters())
    assert not first._loaded.network.training
    assert copy.deepcopy(first)._loaded is None
    assert len(pickle.dumps(first)) < 5000
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = MAKERS[name]()(*batch())
    torch.testing.assert_close(inside, first(*batch()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("make", "key"), [
    (lambda name: PreferenceScore(name), "preference"),
    (lambda name: PreferenceScore(f"{name}/weights.pt", "ViT-H-14"), "preference"),
    (lambda name: TextFidelity(name), "reader"),
    (lambda name: VLMJudge(name), "judge"),
    (lambda name: PerceptualSimilarity("dists", f"{name}/vgg.pth"), "backbone"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["nobody/nothing", "./not/here"])
def test_weights_that_are_not_there_are_one_line(make, key, name):
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}.*set the reward's init_args\.{key}") as error:
        make(name).load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("make", "name", "lost", "key"), [
    (PreferenceScore, PICK, "text_projection.weight", "preference"),
    (TextFidelity, TROCR, "decoder.model.decoder.layers.0.fc1.weight", "reader"),
    (VLMJudge, JUDGE, "lm_head.weight", "judge"),
])  # fmt: skip
def test_a_missing_weight_is_one_line(mirror, tmp_path, make, name, lost, key):
    damaged = shutil.copytree(mirror / name, tmp_path / "damaged")
    state = load_file(damaged / "model.safetensors")
    lost = next(stored for stored in state if stored.endswith(lost))
    save_file({name: weight for name, weight in state.items() if name != lost}, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 weights .*set the reward's init_args\.{key}") as error:
        make(str(damaged)).load()
    assert "\n" not in str(error.value)


def test_files_of_other_networks_are_one_line(mirror, tmp_path):
    for make, key in (
        (lambda: PerceptualSimilarity("lpips_squeeze", ALEX), "backbone"),
        (lambda: PerceptualSimilarity("lpips_alex", f"{HPS}/HPS_v2_compressed.pt"), "backbone"),
        (lambda: PreferenceScore(ALEX, "RN50"), "preference"),
        (lambda: PreferenceScore(ALEX, "ViT-X-99"), "architecture"),
        (lambda: VLMJudge(TROCR), "judge"),
        (lambda: VLMJudge(JUDGE, positive="Yes", negative="Yes")(*batch()), "positive"),
    ):
        with pytest.raises(ValueError, match=rf"init_args\.{key}") as error:
            make().load()
        assert "\n" not in str(error.value)


def test_settings_that_cannot_be_meant_are_one_line():
    for make, key in (
        (lambda: VLMJudge(JUDGE, placement=Placement("float8")), "placement.dtype"),
        (lambda: PerceptualSimilarity("lpips_alex", ALEX, placement=Placement("bfloat16")), "placement.dtype"),
        (lambda: PerceptualSimilarity("ssim", ALEX), "distance"),
        (lambda: PerceptualSimilarity("lpips_alex", ALEX, side=32), "side"),
        (lambda: TextFidelity(TROCR, textless="zero"), "textless"),
    ):
        with pytest.raises(ValueError, match=rf"allowed: .*set the reward's init_args\.{key}"):
            make()


@pytest.mark.parametrize("name", ["pickscore", "trocr", "judge"])
def test_offloaded_and_half_precision_scores_are_close(name):
    sources, redrawn, texts = batch()
    small = MAKERS[name](placement=Placement("bfloat16", offload=True)).load()
    assert next(small._loaded.network.parameters()).dtype is torch.bfloat16
    scores = small(sources, redrawn, texts)
    assert scores.isfinite().all()
    if name != "trocr":  # another letter is another text
        torch.testing.assert_close(scores, MAKERS[name]()(sources, redrawn, texts), rtol=0.05, atol=0.05)
