"""Checkpoints that bring Python code: it does not run, unless a configuration names the checkpoint."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import save_file

from tests.encoders import folders
from uae.cli import mistake
from uae.encoders import HFEncoder
from uae.models.captioners.loading import Reading, load_captioner
from uae.models.pipelines.loading import load_pipeline
from uae.weights.placement import Placement

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("uae", "callbacks") for path in (ROOT / folder).rglob("*.py"))
CODE = """
from pathlib import Path
from transformers import Dinov2Config, Dinov2Model, ProcessorMixin
Path({marker!r}).touch()
class OwnConfig(Dinov2Config):
    model_type = "own"
class OwnModel(Dinov2Model):
    config_class = OwnConfig
class OwnProcessor(ProcessorMixin):
    pass
"""


def calls(path):
    """Calls of a class's or library's loader: where it is, what it is called on, and its keywords."""
    for node in ast.walk(ast.parse(path.read_text())):
        loads = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if loads and node.func.attr in ("from_pretrained", "from_config"):
            yield node, ast.unparse(node.func.value), {word.arg: word.value for word in node.keywords}


def test_no_loader_is_left_to_ask_or_told_to_trust():
    """Without the keyword, transformers asks on the terminal; what it may be is False, or what `trusted` said."""
    seen = 0
    for path in SOURCES:
        text = path.read_text()
        assert "trust_remote_code=True" not in text.replace(" ", "")
        for node, owner, words in calls(path):
            if not owner.split(".")[-1].startswith(("Auto", "DiffusionPipeline", "kind", "loader")) or "diffusers" in str(path):
                continue
            if owner in ("kind", "AutoencoderKL") and node.func.attr == "from_config":  # a class of diffusers itself
                continue
            seen += 1
            given = words.get("trust_remote_code", words.get(None))  # or inside **options
            assert given is not None, f"{path.name}:{node.lineno}: {owner}.{node.func.attr} without trust_remote_code"
            assert ast.unparse(given) in ("False", "trust", "trust and processor_path == path", "options"), f"{path}:{node.lineno}"
    assert seen >= 15


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A DINOv2 under a model type of its own, whose classes lie beside it; ``ran`` is there once they were imported."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "own"
    model = transformers.Dinov2Model.from_pretrained(folders.dinov2(folder))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})  # renaming goes by the model type
    (folder / "code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "code.OwnConfig", "AutoModel": "code.OwnModel", "AutoProcessor": "code.OwnProcessor"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    return folder


def test_an_encoder_runs_code_of_the_checkpoint_that_is_named_only(own):
    with pytest.raises(ValueError, match="holds Python code of its own") as refusal:
        HFEncoder(str(own), "cls").load()
    assert f"set the encoder's init_args.trust_remote_code={own} to run it" in mistake(refusal.value)
    with pytest.raises(ValueError, match="trust_remote_code='another' trusts the code of a checkpoint that is not read"):
        HFEncoder(str(own), "cls", trust_remote_code="another")
    assert not (own.parent / "ran").exists()
    trusting = HFEncoder(str(own), "cls", trust_remote_code=str(own))
    plain = HFEncoder(folders.dinov2(own.parent / "plain"), "cls")
    image = torch.rand(1, 3, 28, 28)
    assert trusting.embed(image).shape == plain.embed(image).shape == (1, 32)
    assert (own.parent / "ran").exists()


def test_a_captioner_runs_none(own):
    with pytest.raises(ValueError, match="holds Python code of its own") as refusal:
        load_captioner(str(own), Reading(), "Describe it.")
    assert f"set system.init_args.reading.trust_remote_code={own}" in mistake(refusal.value)
    with pytest.raises(ValueError, match="reading.trust_remote_code='another' trusts"):
        load_captioner(str(own), Reading(trust_remote_code="another"), "Describe it.")
    assert not (own.parent / "ran").exists()
    with pytest.raises(ValueError, match=r"cannot be read|reads no images"):  # it runs now, but is no captioner
        load_captioner(str(own), Reading(trust_remote_code=str(own)), "Describe it.")
    assert (own.parent / "ran").exists()


@pytest.mark.parametrize("index", [
    {"_class_name": ["pipeline", "Own"]},
    {"_class_name": "DDPMPipeline", "unet": ["own_unet", "Own"]},
])  # fmt: skip
def test_a_pipeline_runs_none_whatever_is_set(tmp_path, index):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_diffusers_version": "0.39.0", **index}))
    for file in (tmp_path / "pipeline.py", tmp_path / "unet/own_unet.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="holds Python code of its own") as refusal:
        load_pipeline(str(tmp_path), Placement())
    assert "nothing runs it here" in mistake(refusal.value)
    assert not (tmp_path / "ran").exists()
