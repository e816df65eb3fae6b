import pytest
import torch

from tests.miniature.pretraining.objectives import SMALL, built, loss
from uae.encoders import HFEncoder, OpenCLIPEncoder
from uae.miniature.patch_autoencoder import PatchAutoencoder
from uae.miniature.scenes import describe
from uae.miniature.tiny import INSTRUCTION, load_captioner, load_decoder, load_processor
from uae.models.captioners.captioner import HFCaptioner
from uae.types import Sampling


@pytest.fixture(params=SMALL)
def objective(request):
    return built(request.param)


def test_the_loss_falls(objective, batch):
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    before = loss(objective, batch).item()
    for _ in range(10):
        optimizer.zero_grad()
        step = loss(objective, batch)
        step.backward()
        assert step.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
        optimizer.step()
    assert loss(objective, batch).item() < 0.97 * before
    with_gradient = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is not None]
    without = {name for name, p in objective.named_parameters() if p.requires_grad} - set(with_gradient)
    assert not {name for name in without if not name.endswith(("mask_token", "attn2.to_q.weight"))}, without


def test_scores_are_shares_or_close_to_it(objective, batch):
    objective.eval()
    first = objective.score(batch)
    assert all(isinstance(value, float) and value == value for value in first.values())
    assert all(-1 <= value <= 1 for name, value in first.items() if name != "words")


def outputs(name, objective, folder, batch):
    """What the trained modules compute, in memory or as their libraries' loaders read them from a folder."""
    images = batch["image"]
    texts = [describe(scene) for scene in batch["scene"]]
    if name == "autoencoding":
        vae = objective.vae
        if folder:
            vae = PatchAutoencoder.from_pretrained(folder / "decoder" / "vae")
        return vae.decode(vae.encode(images * 2 - 1).latents).sample
    if name == "flow_matching":
        if not folder:
            return objective.frozen[0].render(objective.conditioner.encode(texts), range(len(texts)))
        conditioner, renderer = load_decoder(folder / "decoder", steps=8, guidance=1.0)
        return renderer.render(conditioner.encode(texts), range(len(texts)))
    if name == "captioning":
        (captioner,) = objective.frozen
        if folder:
            model, words = load_captioner(folder / "captioner"), load_processor(folder / "captioner")
            captioner = HFCaptioner(model, words, INSTRUCTION)
        return captioner.sample(captioner.prepare(images), 2, Sampling(1.0, 8), range(24)).logp_RS
    if name == "contrastive":
        loaded = OpenCLIPEncoder(f"local-dir:{folder / 'clip'}", None) if folder else None
        return loaded.load("cpu").embed(images) if folder else objective.clip.encode_image((images - 0.5) / 0.5)
    loaded = HFEncoder(str(folder / "judge"), feature="cls") if folder else None
    return loaded.load("cpu").embed(images) if folder else objective.model((images - 0.5) / 0.5).last_hidden_state[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_what_is_saved_is_what_the_system_loads(name, batch, tmp_path, weights):
    objective = built(name).eval()
    for parameter in objective.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    objective.save(tmp_path)
    objective.float()  # what was written may be rounded to half precision; in memory it is then, too
    if name == "flow_matching":  # the autoencoder is an objective of its own
        PatchAutoencoder.from_pretrained(weights / "decoder" / "vae").save_pretrained(tmp_path / "decoder" / "vae")
    expected = outputs(name, objective, None, batch)
    assert expected.std() > 0.01
    torch.testing.assert_close(outputs(name, objective, tmp_path, batch), expected, atol=1e-5, rtol=1e-5)


def test_objectives_hide_what_is_frozen():
    for name in ("captioning", "flow_matching"):
        objective = built(name)
        assert isinstance(objective.frozen, tuple)
        assert not any(key.startswith("frozen") for key in objective.state_dict())
