"""One minus the cosine, through the sampler: its gradient, what trains, what is refused, and what is read back."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from tests.coldstart import runs
from tests.tiny_random import RandomTiny
from uae.coldstart import ColdStart, SemanticReconstruction
from uae.encoders import LayoutEncoder
from uae.miniature.tiny import WEIGHTS, Tiny
from uae.models.finetune import LoRA
from uae.rewards import EncoderSimilarity, WeightedReward
from uae.seeds import seed_of
from uae.systems.uae import UAE
from uae.weights.checksums import checksums
from uae.weights.state import read_state, save_state


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


class Projection:
    """A smooth encoder: a fixed linear map of the pixels."""

    def load(self, device="cpu"):
        return self

    def embed(self, images_NCHW):
        weight = torch.randn(images_NCHW[0].numel(), 5, generator=torch.Generator().manual_seed(1))
        return images_NCHW.flatten(1) @ weight


def built(system=None, **arguments):
    objective = SemanticReconstruction(**{"encoder": Projection(), **arguments})
    objective.use(system or RandomTiny(), LoRA(rank=4), seed=3)
    objective.build()
    return objective


def test_the_loss_is_one_minus_the_cosine_of_what_captions_draw():
    objective, images = built(), runs.batch(24)
    objective.step = 5
    (umm,) = objective.frozen
    losses = []
    for image, number, caption in zip(images["image"], images["id"].tolist(), images["caption"], strict=True):
        with torch.no_grad():
            drawn = umm.renderer.render(umm.conditioner.encode([caption]), [seed_of(3, number, 5)])
        x, y = (objective.encoder.embed(one[None] if one.ndim == 3 else one)[0].double() for one in (image, drawn))
        losses.append(1 - (x @ y / (x.norm() * y.norm())).item())
    assert objective(images, 0.0)["loss"].item() == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert objective(images, 0.9)["loss"].item() == pytest.approx(sum(losses) / 3, abs=1e-5)
    objective.step = -1
    assert objective.score(images)["cosine"] == pytest.approx(1 - objective(images, 0.0)["loss"].item(), abs=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    objective, images = built(), runs.batch(24)
    weight = objective.conditioner.projector[2].weight
    objective(images, 0.0)["loss"].backward()
    place = divmod(weight.grad.abs().argmax().item(), weight.shape[1])
    slope, eps, values = weight.grad[place].item(), 5e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * eps
            values.append(objective(images, 0.0)["loss"].double().item())
            weight[place] -= sign * eps
    assert abs(slope) > 1e-3
    assert (values[0] - values[1]) / (2 * eps) == pytest.approx(slope, rel=0.03)


def test_the_last_steps_alone():
    """All steps counted is the whole gradient; fewer change the gradient, not the loss."""
    gradients, losses = {}, {}
    for last in (None, 1, 2, 5):
        objective = built(last_steps=last)
        loss = objective(runs.batch(24), 0.0)["loss"]
        loss.backward()
        losses[last] = loss.item()
        gradients[last] = objective.conditioner.projector[0].weight.grad
    assert len(set(losses.values())) == 1
    for last in (2, 5):  # the miniature takes two
        torch.testing.assert_close(gradients[last], gradients[None])
    assert F.cosine_similarity(gradients[1].flatten(), gradients[None].flatten(), dim=0) < 0.9999


@pytest.mark.parametrize("trainable", ["projector", r"projector\.2", "."])
def test_the_loss_falls_and_gradients_reach_what_trains(trainable):
    objective = built(trainable=trainable, gradient_checkpointing=True)
    losses = runs.falls(objective, runs.batch(24))
    assert losses[-1] < losses[0]
    (umm,) = objective.frozen
    touched = {name for name, p in umm.conditioner.named_parameters() if p.grad is not None}
    pattern = trainable.replace("\\", "")
    assert touched == {name for name, _ in umm.conditioner.named_parameters() if pattern in name}
    for part in (umm.captioner.learner.network, *umm.renderer.modules()):
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())


@pytest.mark.parametrize("name", ["tiny", "uae", "metaquery"])
def test_three_steps_from_the_command_line(in_a_folder, name, tmp_path):
    run = runs.fit(name, "cold_start", "model.init_args.learning_rate=0.01")
    folder = tmp_path / "outputs" / name
    (umm,) = run.model.objective.frozen
    before, again = runs.started_from(run, folder / "cold_start")
    assert runs.changed(before, umm) == runs.matching(umm, r"^conditioner\.(projector|connector|meta_queries)")
    images = runs.batch(umm.renderer.rendering.height)
    now, then, start = (runs.outputs(one, images)[1] for one in (umm, again, before))
    torch.testing.assert_close(now, then, atol=1e-5, rtol=0)
    assert (now - start).abs().max() > 1e-3
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3
    assert {file.name for file in (folder / "cold_start").iterdir()} == {"conditioner.safetensors"}


def test_the_language_model_trains_where_it_is_asked_to(in_a_folder, tmp_path):
    """Also by the states beside the image, which is the official conditioning."""
    objective = "model.init_args.objective.init_args"
    answers = "model.init_args.system.init_args.condition_on=answer_states"
    run = runs.fit("uae", "cold_start", f"{objective}.language_model=true", "model.init_args.learning_rate=0.01", answers)
    (umm,) = run.model.objective.frozen
    moved = runs.adapters(umm.captioner.learner.network)
    assert moved
    assert any(moved.values())
    _, again = runs.started_from(run, tmp_path / "outputs/uae/cold_start")
    images = runs.batch(32)
    for now, then in zip(runs.outputs(umm, images), runs.outputs(again, images), strict=True):
        torch.testing.assert_close(now, then, atol=1e-4, rtol=0)


def test_a_projector_goes_into_a_checkpoint(in_a_folder, checkpoints, tmp_path):
    run = runs.fit("uae", "cold_start", "model.init_args.learning_rate=0.01")
    trained = read_state(tmp_path / "outputs/uae/cold_start/conditioner.safetensors")
    folder = shutil.copytree(checkpoints / "UAE", tmp_path / "copy")
    state = {**read_state(folder / "llm_lora"), **trained}
    shutil.rmtree(folder / "llm_lora")
    save_state(folder / "llm_lora", "model", state)
    system = run.model.objective.system
    copied = UAE(str(folder), reading=system.reading, rendering=system.rendering).build()
    images = runs.batch(32)
    expected = runs.outputs(run.model.objective.frozen[0], images)[1]
    torch.testing.assert_close(runs.outputs(copied, images)[1], expected, atol=1e-5, rtol=0)

    run = runs.fit("tiny", "cold_start", "model.init_args.learning_rate=0.01")
    trained = read_state(tmp_path / "outputs/tiny/cold_start/conditioner.safetensors")
    folder = shutil.copytree(WEIGHTS, tmp_path / "weights")
    save_state(folder / "decoder", "projector", {k.removeprefix("projector."): v for k, v in trained.items()})
    (folder / "checksums.json").write_text(json.dumps(checksums(folder)))
    assert not runs.changed(run.model.objective.frozen[0], Tiny(str(folder)).build())


@pytest.mark.parametrize(("name", "changes", "reason"), [
    ("qwen_any", [], "nothing to train in PipelineTextConditioner: it has no parameters"),
    ("tiny", ["trainable=nothing"], "none of its 42 parameters matches 'nothing'"),
    ("tiny", ["language_model=true"], "the conditioner reads captions with a language model of its own"),
    ("tiny", ["last_steps=0"], "last_steps=0; allowed: null or 1 or more"),
    ("uae", ["language_model=true", "condition_weights=start"], "set model.init_args.system.init_args.condition_weights to live"),
])  # fmt: skip
def test_what_cannot_train_is_refused_in_one_line(in_a_folder, capsys, name, changes, reason):
    places = {"condition_weights": "system.init_args"}
    changes = [f"model.init_args.{places.get(change.split('=')[0], 'objective.init_args')}.{change}" for change in changes]
    with pytest.raises(SystemExit):
        runs.fit(name, "cold_start", *changes)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert reason in errors[0]


def test_the_encoder_is_the_rewards():
    reward = WeightedReward({"layout": EncoderSimilarity(LayoutEncoder(cells=3))}, {"layout": 1.0})
    model = ColdStart(SemanticReconstruction(), RandomTiny(), reward=reward)
    model.configure_model()
    assert model.objective.encoder is reward.parts["layout"].encoder
    with pytest.raises(ValueError, match=r"set model\.init_args\.objective\.init_args\.encoder"):
        ColdStart(SemanticReconstruction(), RandomTiny()).configure_model()


def test_a_batch_without_captions_and_a_prediction_are_refused():
    objective, images = built(), runs.batch(24)
    del images["caption"]
    with pytest.raises(ValueError, match=r"images of a batch \(train-0, train-1, train-2\) have none"):
        objective(images, 0.0)
    with pytest.raises(ValueError, match="ColdStart cannot predict"):
        ColdStart(SemanticReconstruction(), RandomTiny()).predict_step(images)


def test_what_was_written_for_another_system_is_refused(tmp_path):
    from uae.coldstart import Started

    with pytest.raises(FileNotFoundError, match="no cold start in"):
        Started(RandomTiny(), str(tmp_path)).build()
    save_state(tmp_path, "conditioner", {"projector.0.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"projector\.0\.weight, but HiddenStateConditioner has no parameter of that name and shape"):
        Started(RandomTiny(), str(tmp_path)).build()
