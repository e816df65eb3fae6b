"""What users of real systems get wrong, and the one line they read."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.systems.test_fit import fit

SYSTEM = "--model.init_args.system.init_args"


@pytest.fixture
def mistake(mirrored, monkeypatch, tmp_path, capsys):
    """The line of a run that fails, status 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])

    def failing(name, *extra):
        with pytest.raises(SystemExit) as stop:
            fit(name, extra=extra)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return failing


@pytest.fixture
def copied(mirrored, tmp_path):
    """A checkpoint that may be damaged."""

    def copy(name):
        return Path(shutil.copytree(mirrored / name, tmp_path / "damaged"))

    return copy


def test_a_missing_subfolder(mistake, copied):
    folder = copied("UAE")
    shutil.rmtree(folder / "SD3_model")
    line = mistake("uae", f"{SYSTEM}.checkpoint={folder}")
    assert "lacks SD3_model (it has dit, dit_lora, llm, llm_lora, llm_model_preprocessor)" in line
    assert "model.init_args.system.init_args.checkpoint" in line


def test_a_missing_part_of_a_pipeline(mistake, copied):
    folder = copied("stabilityai/stable-diffusion-3.5-medium")
    shutil.rmtree(folder / "text_encoder_2")
    line = mistake("qwen_any", f"{SYSTEM}.pipeline={folder}")
    assert "text_encoder_2" in line
    assert "model.init_args.system.init_args.pipeline" in line


def test_a_projector_of_another_width(mistake, copied):
    folder = copied("LanguageBind/UniWorld-V1")
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        name = "denoise_tower.denoise_projector.0.weight"
        if name in state:
            save_file({**state, name: torch.zeros(len(state[name]), 48)}, file, metadata={"format": "pt"})
    line = mistake("uniworld_v1", f"{SYSTEM}.checkpoint={folder}")
    assert "takes states of width 48, the language model has 64" in line


def test_an_incomplete_checkpoint_names_what_is_missing_by_group(mistake, copied):
    folder = copied("LanguageBind/UniWorld-V1")
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        state = load_file(file)
        kept = {name: value for name, value in state.items() if ".mlp.down_proj." not in name or "visual" in name}
        save_file({**kept, f"stray.{number}": torch.zeros(2)}, file, metadata={"format": "pt"})
    line = mistake("uniworld_v1", f"{SYSTEM}.checkpoint={folder}")
    assert "missing 2" in line
    assert "down_proj" in line
    assert "stray" in line


def test_a_captioner_without_a_chat_template(mistake, copied):
    folder = copied("Qwen/Qwen2.5-VL-3B-Instruct")
    (folder / "chat_template.jinja").unlink()
    line = mistake("qwen_any", f"{SYSTEM}.captioner={folder}")
    assert "no chat template" in line


def test_guidance_without_a_negative(mistake):
    line = mistake("uniworld_v1", f"{SYSTEM}.rendering.guidance=3.0")
    assert "guidance=3.0" in line
    assert "negative" in line


def test_settings_that_log_probs_cannot_follow(mistake):
    assert "sampling.top_p=0.9" in mistake("qwen_any", "--model.init_args.sampling.top_p=0.9")


def test_a_pickle_that_would_run_code(mistake, tmp_path):
    file = tmp_path / "openuni.pth"
    torch.save({"meta_queries": Path("anything")}, file)
    line = mistake("metaquery", f"{SYSTEM}.checkpoint={file}")
    assert "code" in line


def test_captions_longer_than_the_conditioner_reads(mirrored, monkeypatch, tmp_path):
    """The run goes on; captions are cut aloud and counted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    with pytest.warns(UserWarning, match="captions are longer than the conditioner reads"):
        run = fit("uae", extra=[f"{SYSTEM}.condition_tokens=32", "--trainer.max_steps=1"])
    assert run.trainer.logged_metrics["condition/truncated"] > 0
    assert run.model.umm.conditioner.truncated > 0
