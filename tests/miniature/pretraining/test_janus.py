import random

import pytest
import torch

from uae.miniature import tiny_janus
from uae.miniature.pretraining import CaptionStyle, JanusObjective
from uae.miniature.pretraining import janus as module
from uae.miniature.scenes import Detail, describe, parse, render, sample_scene
from uae.miniature.scenes.world import cell_codes

STYLES = [CaptionStyle(1.0, Detail(size=False)), CaptionStyle(3.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("janus")
    tiny_janus.save(path, tiny_janus.create(width=64, layers=2))
    return str(path)


@pytest.fixture
def objective(folder):
    torch.manual_seed(0)
    built = JanusObjective(STYLES, start=folder)
    built.build()
    return built


def loss(objective, batch):
    """With the same captions at every call."""
    objective.rng = random.Random(5)
    return objective(batch, 1.0)


@torch.no_grad()
def test_the_caption_loss_is_transformers_own(objective, folder, batch, monkeypatch):
    """One image at a time, with labels, no padding and no cache."""
    texts = ["a red ring", describe(batch["scene"][0]), *["a pink cross at top left"] * 10]
    replies = iter(texts)
    monkeypatch.setattr(objective, "caption", lambda scene: next(replies))
    found = loss(objective, batch)["caption"]
    model, words = tiny_janus.load(folder)
    nats, count = 0.0, 0
    for image, text in zip(batch["image"], texts, strict=True):
        pixels = (image * 255).round().to(torch.uint8)
        prompt = f"<|begin|> user: {tiny_janus.IMAGE} describe assistant:"
        inputs = words(text=[f"{prompt} {text} <|end|>"], images=[pixels], return_tensors="pt")
        said = len(text.split()) + 1
        labels = inputs["input_ids"].clone()
        labels[:, :-said] = -100
        # Tokens nobody says have no probability; the model alone gives them some.
        logits = model(**inputs).logits[0, -said - 1 : -1]
        logits[:, objective.policy.banned_ids] = -torch.inf
        nats -= logits.log_softmax(-1).gather(1, labels[0, -said:, None]).sum()
        count += said
    torch.testing.assert_close(found, nats / count, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_the_image_loss_is_nats_per_token_of_the_true_codes(objective, folder, batch, dropout):
    """One prompt at a time, unpadded; the loss behind a prompt without caption is the official one's."""
    objective.dropout = dropout
    objective.rng = random.Random(3)
    found = objective._image_loss(batch["scene"])
    objective.rng = random.Random(3)
    texts = [objective.request(scene) for scene in batch["scene"]]
    assert len({len(text.split()) for text in texts}) > 2
    model, words = tiny_janus.load(folder)
    nats = []
    for text, codes in zip(texts, tiny_janus.scene_codes(batch["scene"]), strict=True):
        said = "<|pad|> " * len(text.split()) if dropout else text
        user, assistant = ("<|pad|>", "<|pad|>") if dropout else ("user:", "assistant:")
        ids = words.tokenizer(f"<|begin|> {user} {said} {assistant} <begin_of_image>", return_tensors="pt")["input_ids"]
        seen = model.prepare_embeddings_for_image_generation(codes[None, :-1])
        embeds = torch.cat([model.get_input_embeddings()(ids), seen], dim=1)
        hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[0, -9:]
        nats.append(-model.model.generation_head(hidden).log_softmax(-1).gather(1, codes[:, None]).mean())
    torch.testing.assert_close(found, torch.stack(nats).mean(), atol=1e-4, rtol=0)


@torch.no_grad()
def test_every_vision_token_reads_its_own_cell(objective, folder, batch, monkeypatch):
    monkeypatch.setattr(module, "sample_scene", lambda rng, counts: batch["scene"][0])
    model, _ = tiny_janus.load(folder)
    scenes = [*batch["scene"], *[batch["scene"][0]] * 12]
    seen = model.model.aligner(model.model.vision_model(render(scenes) * 2 - 1).last_hidden_state)
    logits, codes = objective.reader(seen), cell_codes(scenes)
    nats = [-logits[n, c].log_softmax(0)[codes[n, c]] for n in range(24) for c in range(9)]
    torch.testing.assert_close(objective._reading_loss(batch["scene"]), torch.stack(nats).mean(), atol=1e-5, rtol=0)


def test_the_number_of_objects_to_draw_grows(objective, batch, monkeypatch):
    seen = []
    monkeypatch.setattr(objective, "_image_loss", lambda scenes: seen.append(scenes) or torch.zeros(()))
    for progress, most in ((0.0, 1), (0.1, 2), (0.24, 2), (0.25, 3), (1.0, 3)):
        for _ in range(4):
            objective(batch, progress)
        assert max(len(scene.objects) for scenes in seen[-4:] for scene in scenes) == most
        assert all(len(scenes) == len(batch["scene"]) for scenes in seen)
    seen.clear()
    objective.curriculum, objective.drawn = False, 0.5
    for _ in range(8):
        objective(batch, 0.0)
    assert max(len(scene.objects) for scenes in seen for scene in scenes) == 3
    assert all(2 * len(scenes) == len(batch["scene"]) for scenes in seen)


def test_images_are_asked_for_in_every_level_of_detail(objective):
    rng, spoken = random.Random(0), {"size": 0, "position": 0, "background": 0, "all": 0}
    for _ in range(3000):
        scene = sample_scene(rng)
        asked = parse(objective.request(scene))
        said = [asked.objects[0].size is not None, asked.objects[0].row is not None, asked.background is not None]
        for name, value in zip(spoken, [*said, all(said)], strict=True):
            spoken[name] += value
        missing = len(scene.objects) - len(asked.objects)
        assert missing == 0 or not any(said)
    for name in ("size", "position", "background"):
        assert abs(spoken[name] / 3000 - 0.75) < 0.03  # half are detailed, of the others again half
    assert abs(spoken["all"] / 3000 - (0.5 + 0.5 / 8)) < 0.03


def test_prompts_lose_their_caption_at_the_rate_asked_for(objective):
    objective.dropout = 0.25
    condition = objective.prompts(["a red ring", "a blue cross at top left"] * 1000)
    empty = (condition.ids_NL == condition.uncond_ids_NL).all(1)
    assert abs(empty.float().mean() - 0.25) < 0.04


def test_everything_but_the_autoencoder_learns(objective, batch):
    frozen = {name: value.clone() for name, value in objective.policy.base.model.vqmodel.state_dict().items()}
    optimizer = torch.optim.AdamW(objective.parameters(), 3e-3)
    before = loss(objective, batch)
    for _ in range(8):
        optimizer.zero_grad()
        loss(objective, batch)["loss"].backward()
        without = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not without
        optimizer.step()
    after = loss(objective, batch)
    assert all(after[name] < 0.95 * before[name] for name in ("caption", "image", "reading", "loss"))
    torch.testing.assert_close(before["loss"], before["caption"] + before["image"] + before["reading"])
    now = objective.policy.base.model.vqmodel.state_dict()
    assert now.keys() == frozen.keys()
    assert all(torch.equal(value, frozen[name]) for name, value in now.items())
    assert not any("vqmodel" in name for name, _ in objective.named_parameters())


@torch.no_grad()
def test_what_is_saved_is_what_the_system_loads(objective, batch, tmp_path):
    for parameter in objective.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        parameter.copy_((parameter + 0.02 * noise).half())  # what is written is rounded
    expected, scores, names = loss(objective, batch), objective.score(batch), objective.policy.base.state_dict().keys()
    objective.save(tmp_path)
    again = JanusObjective(STYLES, start=str(tmp_path))
    again.build()
    again.reader.load_state_dict(objective.reader.state_dict())
    assert again.policy.base.state_dict().keys() == names
    found = loss(again, batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again.score(batch) == scores
