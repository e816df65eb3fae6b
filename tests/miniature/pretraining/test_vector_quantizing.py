import random

import pytest
import torch

from uae.miniature import tiny_janus
from uae.miniature.pretraining import VectorQuantizingObjective
from uae.miniature.pretraining.autoencoding import inverse_area
from uae.miniature.scenes import render


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    built = VectorQuantizingObjective()
    built.build()
    return built


def loss(objective, batch):
    """With the same crowded scenes at every call."""
    objective.rng = random.Random(5)
    return objective(batch, 1.0)


@torch.no_grad()
def test_terms_are_what_transformers_own_steps_give(objective, batch, monkeypatch):
    monkeypatch.setattr("uae.miniature.pretraining.vector_quantizing.sample_scene", lambda rng, counts: batch["scene"][0])
    terms = loss(objective, batch)
    scenes = [*batch["scene"], *[batch["scene"][0]] * 12]
    images, codes = render(scenes), tiny_janus.scene_codes(scenes)
    janus = objective.frozen[0]
    drawn = janus.decode_image_tokens(codes).permute(0, 3, 1, 2) * 0.5 + 0.5
    torch.testing.assert_close(terms["drawing"], (inverse_area(images) * (drawn - images) ** 2).mean())
    codebook, nats = objective.model.quantize.embedding.weight, []
    for image, row in zip(images, codes, strict=True):
        hidden = objective.model.quant_conv(objective.model.encoder(image[None] * 2 - 1))[0]
        for cell, code in enumerate(row.tolist()):
            squared = ((hidden[:, cell // 3, cell % 3] - codebook) ** 2).sum(1)
            nats.append(-(-10.0 * squared).log_softmax(0)[code])
    torch.testing.assert_close(terms["coding"], torch.stack(nats).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms["loss"], terms["drawing"] + 0.1 * terms["coding"])


@torch.no_grad()
def test_the_likeliest_code_is_the_quantisers(objective, batch):
    tokens = objective.model.encode(batch["image"] * 2 - 1).image_tokens.view(12, 9)
    assert torch.equal(objective._logits(batch["image"]).argmax(-1), tokens)
    assert len(tokens.unique()) > 1


def test_only_the_autoencoder_learns(objective, batch):
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-3)
    language = objective.frozen[0].model.language_model.embed_tokens.weight
    start, before = language.detach().clone(), loss(objective, batch)
    for _ in range(8):
        optimizer.zero_grad()
        loss(objective, batch)["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
        optimizer.step()
    after = loss(objective, batch)
    assert all(after[name] < 0.9 * before[name] for name in ("drawing", "coding"))
    assert torch.equal(language, start)


@torch.no_grad()
def test_what_is_saved_is_what_the_system_loads(batch, tmp_path):
    torch.manual_seed(1)
    objective = VectorQuantizingObjective()
    objective.build()
    scores = objective.eval().score(batch)
    assert scores["whole"] == scores["whole_true_codes"] == 0  # untrained
    objective.save(tmp_path)
    objective.float()  # what was written is rounded to half precision; in memory it is then, too
    model, _ = tiny_janus.load(tmp_path)
    codes = tiny_janus.scene_codes(batch["scene"])
    assert torch.equal(model.decode_image_tokens(codes), objective.frozen[0].float().decode_image_tokens(codes))


@torch.no_grad()
def test_scores_of_a_perfect_autoencoder(objective, batch, monkeypatch):
    codes = tiny_janus.scene_codes(batch["scene"])
    wrong = codes.clone()
    wrong[0, 0] += 1
    monkeypatch.setattr(objective, "_draw", lambda tokens: render_codes(tokens))
    for found, expected in ((codes, (1.0, 1.0)), (wrong, (1 - 1 / 108, 1 - 1 / 12))):
        output = type("Output", (), {"image_tokens": found.flatten()})
        monkeypatch.setattr(objective.model, "encode", lambda images, output=output: output)
        scores = objective.score(batch)
        assert scores["whole_true_codes"] == 1
        assert (scores["codes"], scores["whole"]) == pytest.approx(expected)


def render_codes(codes):
    """Cell pictures side by side."""
    from uae.miniature.scenes.world import KINDS, cell_pictures

    cells = cell_pictures()[codes // KINDS, codes % KINDS].unflatten(1, (3, 3))
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 24, 24)
