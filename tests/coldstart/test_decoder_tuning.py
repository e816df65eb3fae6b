"""Flow matching of any pipeline: the velocity, the loss, what trains, and what is read back."""

import json
import shutil

import pytest
import torch

from tests.coldstart import runs
from tests.models.pipelines import pipeline_cases as cases
from tests.tiny_random import RandomTiny
from uae.coldstart import ColdStart, DecoderTuning
from uae.coldstart.velocity import latents_of, velocity_of
from uae.miniature.tiny import WEIGHTS, Tiny
from uae.models.finetune import Full, LoRA
from uae.models.renderers.diffusers import DiffusersRenderer, Rendering
from uae.seeds import seed_of
from uae.types import UMM
from uae.weights.checksums import checksums

FLOW = ["sd3", "flux", "sana", "qwen_image"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return runs.checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def in_a_folder(checkpoints, monkeypatch, tmp_path):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(checkpoints))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])


@pytest.fixture(autouse=True)
def not_the_package():
    """Instead: the package's weights."""


def renderer_of(name, **changes):
    rendering = {"steps": 1, "rows": 3, "placement": cases.FLOAT32, **changes}
    return DiffusersRenderer(cases.load(name), Rendering(cases.SIDE, cases.SIDE, **rendering))


def built(**arguments):
    objective = DecoderTuning(**arguments)
    objective.use(RandomTiny(), seed=3)
    objective.build()
    return objective


@torch.no_grad()
@pytest.mark.parametrize("name", FLOW)
def test_one_step_from_noise_goes_along_the_velocity(name):
    """``noise - velocity`` at time 1, decoded, is what the pipeline draws in a single step (Sana's begins a little later)."""
    renderer, condition = renderer_of(name), cases.ragged(name)
    pipe, seeds = renderer.pipe, [3, 4, 5, 6]
    if name == "qwen_image":
        pipe.scheduler.register_to_config(shift_terminal=None)  # which the library divides by zero for in a single step
    time, sigma = (0.999, 2.997 / 2.998) if name == "sana" else (1.0, 1.0)  # shift 3 of 0.999
    noise = []  # what the pipeline starts from, by its own draw
    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *a, **k: noise.append(start := prepare(*a, **k)) or start
    expected = renderer.render(condition, seeds)
    del pipe.prepare_latents
    parts = [start[0] if isinstance(start, tuple) else start for start in noise]
    order = [row for rows in renderer._batches(condition) for row in rows]
    start = torch.cat(parts)[torch.tensor(order).argsort()]
    end = start - sigma * velocity_of(renderer, start, torch.full((4,), time), condition)
    torch.testing.assert_close(decoded(renderer, end), expected, **cases.CLOSE)


def decoded(renderer, latents):
    """Pixels of latents in the pipeline's own layout."""
    pipe, config, side = renderer.pipe, renderer.pipe.vae.config, cases.SIDE
    if hasattr(pipe, "_unpack_latents"):
        latents = pipe._unpack_latents(latents, side, side, pipe.vae_scale_factor)
    if getattr(config, "latents_mean", None):
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        return (pipe.vae.decode(latents * std + mean).sample[:, :, 0] / 2 + 0.5).clamp(0, 1)
    latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
    return (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", FLOW)
def test_latents_are_what_the_pipeline_decodes(name):
    renderer, images = renderer_of(name), runs.batch(cases.SIDE)["image"]
    vae, pixels = renderer.pipe.vae, images * 2 - 1
    if name == "qwen_image":
        expected = vae.decode(vae.encode(pixels[:, :, None]).latent_dist.mean).sample[:, :, 0]
    else:
        encoded = vae.encode(pixels)
        expected = vae.decode(encoded.latent if name == "sana" else encoded.latent_dist.mean).sample
    found = decoded(renderer, latents_of(renderer, images))
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), **cases.CLOSE)
    large = torch.nn.functional.interpolate(images, scale_factor=2)
    torch.testing.assert_close(latents_of(renderer, large).shape, latents_of(renderer, images).shape)


@torch.no_grad()
@pytest.mark.parametrize("name", FLOW)
def test_every_row_has_a_time_of_its_own(name):
    renderer, condition = renderer_of(name), cases.ragged(name)
    latents = latents_of(renderer, runs.batch(cases.SIDE, 4)["image"])
    times = torch.tensor([0.1, 0.9, 0.5, 0.3])
    together = velocity_of(renderer, latents, times, condition)
    for n in range(4):
        alone = velocity_of(renderer, latents[n : n + 1], times[n : n + 1], condition.index([n]))
        torch.testing.assert_close(together[n : n + 1], alone, **cases.CLOSE)
    later = velocity_of(renderer, latents, times.flip(0), condition)
    assert (together - later).abs().amax(tuple(range(1, later.ndim))).min() > 1e-4


def test_the_loss_is_a_regression_in_a_plain_loop():
    objective, images = built(mean=0.5, std=1.5), runs.batch(24)
    objective.step = 7
    (umm,) = objective.frozen
    transformer, vae, total = umm.renderer.pipe.transformer, umm.renderer.pipe.vae, []
    for image, number, caption in zip(images["image"], images["id"].tolist(), images["caption"], strict=True):
        stream = torch.Generator().manual_seed(seed_of(3, number, 7, "flow"))
        torch.rand(1, generator=stream)  # whether the caption is dropped
        time = 1 / (1 + torch.exp(-(0.5 + 1.5 * torch.randn(1, generator=stream).double())))
        with torch.no_grad():
            latent = vae.encode(image[None] * 2 - 1).latents.double()
            noise = torch.randn(latent.shape[1:], generator=stream)[None].double()
            condition = umm.conditioner.encode([caption])
            velocity = transformer(
                hidden_states=((1 - time) * latent + time * noise).float(),
                timestep=(1000 * time).float(),
                encoder_hidden_states=condition.embeds_NLD,
                pooled_projections=condition.pooled_NP,
                return_dict=False,
            )[0]
        total += (velocity.double() - (noise - latent)).square().flatten().tolist()
    assert objective(images, 0.0)["loss"].item() == pytest.approx(sum(total) / len(total), rel=1e-5)


def test_noise_follows_from_image_and_step():
    objective, images = built(), runs.batch(24)
    first = objective(images, 0.0)["loss"].item()
    assert objective(images, 0.7)["loss"].item() == first
    assert objective.score(images) == objective.score(images)
    objective.step = 1
    assert abs(objective(images, 0.0)["loss"].item() - first) > 1e-3


def test_dropped_captions_are_empty(monkeypatch):
    objective, images, seen = built(dropout=0.5), runs.batch(24, 40), []
    (umm,) = objective.frozen
    encode = umm.conditioner.encode
    monkeypatch.setattr(umm.conditioner, "encode", lambda texts, rollout: seen.extend(texts) or encode(texts, rollout))
    objective(images, 0.0)
    assert 10 <= seen.count("") <= 30
    assert all(text in ("", caption) for text, caption in zip(seen, images["caption"], strict=True))


@pytest.mark.parametrize("trainable", ["", "projector"])
@pytest.mark.parametrize("decoder", [LoRA(rank=4, target_modules=r".*attn\.to_q"), Full(r"transformer_blocks")])
def test_the_loss_falls_and_gradients_reach_what_trains(decoder, trainable):
    objective = built(decoder=decoder, trainable=trainable, gradient_checkpointing=True)
    losses = runs.falls(objective, runs.batch(24))
    assert losses == sorted(losses, reverse=True)
    (umm,) = objective.frozen
    pattern = "lora_" if isinstance(decoder, LoRA) else "transformer_blocks"
    touched = {name for name, p in umm.renderer.pipe.transformer.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in umm.renderer.pipe.transformer.named_parameters() if pattern in name}
    touched = {name for name, p in umm.conditioner.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in umm.conditioner.named_parameters() if trainable and trainable in name}
    for part in (umm.captioner.learner.network, umm.renderer.pipe.vae):
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())


@pytest.mark.parametrize("name", ["tiny", "uae", "metaquery"])
def test_three_steps_from_the_command_line(in_a_folder, name, tmp_path):
    run = runs.fit(name, "cold_start_decoder", "model.init_args.learning_rate=0.01")
    folder = tmp_path / "outputs" / name
    (umm,) = run.model.objective.frozen
    before, again = runs.started_from(run, folder / "cold_start")
    assert runs.changed(before, umm) == runs.matching(umm, r"^conditioner\.(projector|connector|meta_queries)")
    still = [key for key, moved in runs.adapters(run.model.objective.denoiser).items() if not moved]
    assert all("add_q_proj" in key for key in still)  # of the last block, where nobody reads what text asks
    assert len(still) <= 1
    images = runs.batch(umm.renderer.rendering.height)
    now, then, start = (runs.outputs(one, images)[1] for one in (umm, again, before))
    torch.testing.assert_close(now, then, atol=1e-4, rtol=0)
    assert (now - start).abs().max() > 1e-3
    assert json.loads((folder / "summary.json").read_text())["after"]["decoder_tuning/error"] > 0


def test_what_full_training_writes_is_a_checkpoint(in_a_folder, tmp_path):
    full = ["decoder=Full", "decoder.init_args.trainable=transformer_blocks", "trainable="]
    run = runs.fit("tiny", "cold_start_decoder", *(f"model.init_args.objective.init_args.{change}" for change in full))
    (umm,) = run.model.objective.frozen
    unread = r"(?!.*blocks\.4\.attn\.(norm_added_q|add_q_proj))"  # what text asks in the last block
    assert runs.changed(Tiny().build(), umm) == runs.matching(umm, rf"^{unread}denoiser\.transformer_blocks\.")
    folder = shutil.copytree(WEIGHTS, tmp_path / "weights")
    shutil.rmtree(folder / "decoder" / "transformer")
    shutil.copytree(tmp_path / "outputs/tiny/cold_start/denoiser", folder / "decoder" / "transformer")
    (folder / "checksums.json").write_text(json.dumps(checksums(folder)))
    assert not runs.changed(umm, Tiny(str(folder)).build())


class Assembled:
    """The miniature's captioner with another renderer."""

    def __init__(self, renderer):
        self.renderer = renderer

    def build(self):
        umm = RandomTiny().build()
        return UMM(umm.captioner, umm.conditioner, self.renderer)


class Elsewhere:
    """A renderer that is no pipeline."""

    def render(self, condition, seeds, grad=False):
        raise AssertionError("never called")


@pytest.mark.parametrize(("renderer", "reason"), [
    (Elsewhere, "Elsewhere is no diffusers pipeline"),
    (lambda: renderer_of("sdxl"), "StableDiffusionXLPipeline with .* does not draw by flow matching"),
    (lambda: renderer_of("omnigen"), "takes captions as text only"),
    (lambda: renderer_of("sd3", placement=cases.Placement("float32", offload=True)), "offload to false"),
])  # fmt: skip
def test_what_cannot_train_is_refused(renderer, reason):
    model = ColdStart(DecoderTuning(), Assembled(renderer()))
    with pytest.raises(ValueError, match=reason):
        model.configure_model()


def test_weights_that_round_are_refused():
    renderer = DiffusersRenderer(cases.load("sd3", cases.Placement()), Rendering(cases.SIDE, cases.SIDE))
    with pytest.raises(ValueError, match=r"placement\.dtype=bfloat16 would round away the updates of Full"):
        ColdStart(DecoderTuning(decoder=Full(".")), Assembled(renderer)).configure_model()
    with pytest.raises(ValueError, match=r"dropout=2; allowed: 0 to 1"):
        DecoderTuning(dropout=2)
