"""Real systems whose captions an engine draws, through the command line."""

import sys

import pytest

from tests.models.captioners import fake_vllm
from tests.systems.test_fit import fit
from uae.models.captioners.loading import Reading
from uae.models.captioners.vllm_engine import VLLM
from uae.systems.emu3 import Emu3
from uae.systems.janus_pro import JanusPro
from uae.systems.x_omni import XOmni

ENGINE = "--model.init_args.system.init_args.reading.engine"


@pytest.fixture(autouse=True)
def place(mirrored, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])


@pytest.mark.parametrize(("name", "finetune"), [("qwen_any", "full"), ("uae", "lora")])
def test_three_steps(monkeypatch, tmp_path, name, finetune):
    """With validation, a KL term and an export."""
    started = fake_vllm.install(monkeypatch)
    extra = [f"{ENGINE}.dtype=float32", "--model.init_args.optimizer.init_args.lr=0.01"]
    run = fit(name, f"finetune/{finetune}_pretrained.yaml", "engine/vllm.yaml", extra=extra)
    assert run.trainer.global_step == 3
    assert run.trainer.logged_metrics["policy/sampler_gap"] < 1e-4
    (engine,) = started
    assert engine.settings["max_model_len"] == 4096
    assert len(engine.sent) == 4  # before every rollout, and before the validation at the end
    assert engine.asleep
    captioner = run.model.umm.captioner
    assert fake_vllm.same_weights(engine, captioner.learner.network)
    assert list(tmp_path.rglob("export/*processor_config.json"))  # the whole captioner


def test_a_missing_library_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit) as stop:
        fit("qwen_any", "engine/vllm.yaml")
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "reading.engine needs vLLM (Python 3.11 or newer): pip install 'uae[vllm]'" in line


@pytest.mark.parametrize(
    ("system", "name"),
    [(JanusPro, "deepseek-community/Janus-Pro-1B"), (Emu3, "BAAI/Emu3-Gen-hf"), (XOmni, "X-Omni/X-Omni-En")],
)
def test_networks_that_draw_are_refused(system, name):
    with pytest.raises(ValueError, match=r"reading\.engine is set, but the network of .* draws images, too"):
        system(name, reading=Reading(engine=VLLM())).build()
