"""Each reward equals a plain computation with the library that its model comes from."""

from unittest import mock

import open_clip
import pytest
import torch
import torchvision
import transformers
from torch.nn.functional import normalize
from torchmetrics.functional.image import deep_image_structure_and_texture_similarity, dists, lpips
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as lpips_of
from torchmetrics.functional.text import edit_distance as library_edit_distance
from torchvision.transforms.functional import to_pil_image

from tests.rewards.test_networks import ALEX, GOT, HPS, JUDGE, PICK, TROCR, B, G, batch, folder, mirror  # noqa: F401
from uae.rewards import PerceptualSimilarity, PreferenceScore, TextFidelity, VLMJudge
from uae.rewards.text import edit_distance


def pictures(side):
    """8-bit images of the size of the network, which no preprocessing resizes."""
    sources, redrawn, texts = batch()
    images = torch.nn.functional.interpolate(torch.cat([sources, redrawn]), (side, side))
    images = (images * 255 * torch.rand(len(images), 3, 1, 1, generator=torch.Generator().manual_seed(3))).round() / 255
    return images[:B], images[B:], texts


def pil(images):
    return [to_pil_image((image * 255).round().to(torch.uint8)) for image in images]


@torch.no_grad()
def test_pickscore_is_the_diagonal_of_clips_logits(mirror):  # noqa: F811
    sources, redrawn, texts = pictures(28)
    texts[0] = "a very long caption " * 20  # cut
    model = transformers.CLIPModel.from_pretrained(mirror / PICK).eval()
    processor = transformers.AutoProcessor.from_pretrained(mirror / PICK)
    inputs = processor(images=pil(redrawn), text=texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    expected = model(**inputs).logits_per_image.diagonal().view(B, G)
    assert expected.std() > 0.1
    torch.testing.assert_close(PreferenceScore(PICK)(sources, redrawn, texts), expected, rtol=1e-5, atol=1e-5)
    cosine = PreferenceScore(PICK, scaled=False)(sources, redrawn, texts)
    torch.testing.assert_close(cosine * model.logit_scale.exp(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_hpsv2_is_the_cosine_of_open_clip(mirror):  # noqa: F811
    sources, redrawn, texts = pictures(28)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{mirror / HPS}", load_weights=False)
    model.load_state_dict(torch.load(mirror / HPS / "HPS_v2_compressed.pt", weights_only=True)["state_dict"])
    pixels, tokens = torch.stack([transform(image) for image in pil(redrawn)]), open_clip.get_tokenizer("ViT-H-14")(texts)
    image, text = (normalize(f) for f in (model.eval().encode_image(pixels), model.encode_text(tokens)))
    expected = (image @ text.T).diagonal().view(B, G)
    assert expected.std() > 0.01
    reward = PreferenceScore(f"{HPS}/HPS_v2_compressed.pt", "ViT-H-14")
    torch.testing.assert_close(reward(sources, redrawn, texts), expected, rtol=1e-5, atol=1e-5)


def test_lpips_is_that_of_torchmetrics(mirror):  # noqa: F811
    sources, redrawn, texts = pictures(64)
    backbone = torchvision.models.alexnet().features
    state = torch.load(mirror / ALEX, weights_only=True)
    backbone.load_state_dict({name.removeprefix("features."): weight for name, weight in state.items()})
    with mock.patch.object(lpips, "_get_tv_model_features", return_value=backbone):
        expected = lpips_of(redrawn, sources.repeat_interleave(G, 0), "alex", reduction="none", normalize=True)
    reward = PerceptualSimilarity("lpips_alex", ALEX, side=64)
    torch.testing.assert_close(reward(sources, redrawn, texts), -expected.view(B, G), rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize("distance", ["dists", "lpips_vgg", "lpips_squeeze"])
def test_other_distances_are_those_of_torchmetrics(tmp_path, distance):
    sources, redrawn, texts = pictures(64)
    name = "squeezenet1_1" if "squeeze" in distance else "vgg16"
    network = getattr(torchvision.models, name)(**{} if "squeeze" in distance else {"init_weights": False}).eval()
    torch.save({key: value for key, value in network.state_dict().items() if "features" in key}, tmp_path / "weights.pth")
    pair = redrawn, sources.repeat_interleave(G, 0)
    if distance == "dists":
        with mock.patch.object(dists, "vgg16", return_value=network):
            expected = deep_image_structure_and_texture_similarity(*pair, reduction="none")
    else:
        with mock.patch.object(lpips, "_get_tv_model_features", return_value=network.features):
            expected = lpips_of(*pair, distance.removeprefix("lpips_"), reduction="none", normalize=True)
    reward = PerceptualSimilarity(distance, str(tmp_path / "weights.pth"), side=64)
    torch.testing.assert_close(reward(sources, redrawn, texts), -expected.view(B, G).detach(), rtol=1e-5, atol=1e-5)
    assert reward(sources, sources, texts[:B]).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "tokens"), [(TROCR, 12), (GOT, 6), (JUDGE, 6)])
@torch.no_grad()
def test_text_is_what_greedy_decoding_reads(mirror, name, tokens):  # noqa: F811
    sources, redrawn, texts = pictures(32)
    model = transformers.AutoModelForImageTextToText.from_pretrained(mirror / name, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(mirror / name)

    def read_by_chat(image):
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What is written here?"}]
        turn = [{"role": "user", "content": content}]
        return processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")

    def read(image):
        inputs = read_by_chat(image) if name == JUDGE else processor(images=[image], return_tensors="pt")
        greedy = {"num_beams": 1, "do_sample": False, "no_repeat_ngram_size": 0, "early_stopping": False, "repetition_penalty": 1.0}
        out = model.generate(**inputs, **greedy, max_new_tokens=tokens, max_length=None)
        out = out[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else out
        return " ".join(processor.batch_decode(out, skip_special_tokens=True)[0].split())

    a, b = [read(image) for image in pil(sources)], [read(image) for image in pil(redrawn)]
    assert len(set(a + b)) > (1 if name == JUDGE else 4)  # a chat model with random weights says much the same
    pairs = [(a[n // G], b[n]) for n in range(B * G)]
    expected = [1 - library_edit_distance(*pair, reduction="sum").item() / max(map(len, pair)) for pair in pairs]
    expected = [score if any(map(str.isalnum, source)) else 1.0 for score, (source, _) in zip(expected, pairs, strict=True)]
    assert len(set(expected)) > 1
    reward = TextFidelity(name, prompt="What is written here?", max_tokens=tokens)
    torch.testing.assert_close(reward(sources, redrawn, texts), torch.tensor(expected).view(B, G), rtol=1e-5, atol=1e-5)


def test_sources_are_read_once_and_without_text_worth_what_is_asked(monkeypatch):
    seen = []

    def texts(self, loaded, images):
        seen.append(len(images))
        return ["OPEN", " - "] if len(images) == B else ["OPEN", "OPPEN", "", "OPEN", "", "x"]

    monkeypatch.setattr(TextFidelity, "texts", texts)
    expected = {"one": [[1, 0.8, 0], [1, 1, 1]], "nan": [[1, 0.8, 0], [torch.nan] * 3]}
    for textless, values in expected.items():
        result = TextFidelity(TROCR, textless=textless)(*batch())
        torch.testing.assert_close(result, torch.tensor(values), equal_nan=True)
    assert seen == [B, B * G] * 2


def test_edit_distance_is_exact_for_shifted_texts_too():
    for a, b in (("kitten", "sitting"), ("", "abc"), ("same", "same"), ("flaw", "lawn")):
        assert edit_distance(a, b) == library_edit_distance(a, b, reduction="sum") == edit_distance(b, a)
    word = "abcdefghij" * 8
    assert edit_distance(word, "z" * 40 + word) == 40


@pytest.mark.parametrize("name", [JUDGE])
@torch.no_grad()
def test_the_judge_is_asked_as_its_library_asks(mirror, name):  # noqa: F811
    sources, redrawn, texts = pictures(56)
    model = transformers.AutoModelForImageTextToText.from_pretrained(mirror / name, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(mirror / name)
    tokenizer = processor.tokenizer
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Good", "Bad"))
    say = lambda text: {"type": "text", "text": text}  # noqa: E731
    expected = []
    for n, image in enumerate(pil(redrawn)):
        first = {"type": "image", "image": pil(sources)[n // G]}
        content = [say("First picture:"), first, say("Second picture:"), {"type": "image", "image": image}, say("Same?")]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected.append(model(**inputs).logits[0, -1, [yes, no]].softmax(0)[0])
    expected = torch.stack(expected).view(B, G)
    assert expected.std() > 1e-3
    reward = VLMJudge(name, question="Same?", positive="Good", negative="Bad", rows=4)
    torch.testing.assert_close(reward(sources, redrawn, texts), expected, rtol=1e-5, atol=1e-5)
