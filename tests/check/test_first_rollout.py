"""The first rollout of a new run is looked at in brief, and a fault stops the run before its first update."""

import pytest
import torch

from tests.check import systems
from tests.check.systems import faulty
from tests.conftest import data
from uae import cli
from uae.check.parts.first_rollout import FirstRollout
from uae.models.finetune import LoRA

BOTH = {"train": "both", "finetune": LoRA(rank=2)}
FAULTS = {
    "size": (faulty(renderer=systems.Narrow), {}, r"images are \(12, 3, 24, 23\), not \(12, 3, 24, 24\)"),
    "range": (faulty(renderer=systems.Bright), {}, "pixels are outside"),
    "captions in a batch": (faulty(systems.CountsPadding), {}, "log-probs of a caption depend on the captions beside it"),
    "pictures in a batch": (faulty(renderer=systems.Averages), {}, "pixels of an image depend on the captions beside it"),
    "tokens in a batch": (
        faulty(renderer=systems.TokensCountRows, base=systems.Janus), BOTH, "log-probs of an image depend on the images beside it",
    ),
    "guidance": (faulty(renderer=systems.GuidesTwice, base=systems.Guided), {}, r"guidance is not u \+ w \(c - u\)"),
    "guidance of tokens": (faulty(renderer=systems.GuidesTokensTwice, base=systems.Janus), BOTH, r"guidance is not u \+ w \(c - u\)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_run(build, trainer, fault):
    system, changes, message = FAULTS[fault]
    module = build(system=system(), **changes)
    run = trainer(callbacks=[FirstRollout()])
    with pytest.raises(RuntimeError, match=rf"^the first rollout is wrong: {message}.*python -m uae\.check") as stopped:
        run.fit(module, data())
    assert "\n" not in str(stopped.value)
    assert run.global_step == 0


class Calls:
    """Rows that a captioner scores and a renderer draws."""

    def __init__(self, umm):
        self.scored, self.drawn = [], []
        logprobs, render = umm.captioner.logprobs, umm.renderer.render
        umm.captioner.logprobs = lambda rollout: self.scored.append(len(rollout)) or logprobs(rollout)
        umm.renderer.render = lambda condition, seeds: self.drawn.append(len(seeds)) or render(condition, seeds)


@pytest.mark.parametrize("kind", [systems.RandomTiny, systems.Guided, systems.Janus])
def test_a_sound_run_goes_on_and_one_row_is_looked_at_once(build, trainer, kind):
    changes = BOTH if kind is systems.Janus else {}
    states = {}
    for callbacks in ([], [FirstRollout()]):
        module = build(system=kind(), **changes)
        module.configure_model()
        calls = Calls(module.umm)
        trainer(callbacks=callbacks, max_steps=2).fit(module, data())
        states[len(callbacks)] = {name: weight.clone() for name, weight in module.named_parameters()}, calls
    (without, few), (looked, more) = states[0], states[1]
    assert all(torch.equal(weight, looked[name]) for name, weight in without.items())
    assert sorted(more.scored) == sorted([*few.scored, 1])
    assert sum(more.drawn) - sum(few.drawn) == (kind is not systems.Janus)


def test_a_command_looks_unless_it_is_told_not_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    from tests.models.test_toy_captioner import ROOT

    words = [f"--config={ROOT / file}" for file in ("configs/tiny.yaml", "tests/equivalence.yaml")]
    words += ["--model.init_args.system.class_path=tests.check.systems.FaultyTiny", "--trainer.max_steps=1"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *words])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "pixels are outside [0, 1]" in line
    run = cli.main(["fit", *words, "--check_first_rollout=false"])
    assert run.trainer.global_step == 1
