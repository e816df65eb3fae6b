"""Whole weights of an earlier run in the place of those that a network has, by the names of each library."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from callbacks.export import save_model
from tests.tiny_random import RandomTiny
from uae.learner import FrozenCopy, Learner, Network
from uae.models.finetune import Full, LoRA, default_targets
from uae.models.flow.network import FlowNetwork
from uae.weights.state import save_state

KEY = "model.init_args.finetune.init_args.weights"


def moved(model):
    """Weights that no other model has."""
    torch.manual_seed(1)
    return {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}


@pytest.fixture
def exported(tmp_path):
    """Captioner, denoiser and a module of no library, each with a folder of other weights as an export writes it."""
    umm = RandomTiny().build()
    captioner, denoiser = umm.captioner.learner.network, umm.renderer.pipe.transformer
    tied = moved(captioner.model)
    tied["lm_head.weight"] = tied["model.language_model.embed_tokens.weight"]
    save_model(tmp_path / "captioner", captioner.model, dict(tied))
    other = moved(denoiser)
    denoiser.save_config(tmp_path / "denoiser")
    save_state(tmp_path / "denoiser", "diffusion_pytorch_model", other)
    plain = torch.nn.Linear(3, 2)
    save_state(tmp_path / "plain", "model", plain_state := moved(plain))
    return {"captioner": (captioner, tied), "denoiser": (FlowNetwork(denoiser), other), "plain": (Network(plain), plain_state)}


@pytest.mark.parametrize("kind", ["captioner", "denoiser", "plain"])
def test_all_weights_are_those_of_the_folder(exported, tmp_path, kind):
    network, expected = exported[kind]
    learner = Learner(network)
    Full(".*", weights=str(tmp_path / kind)).attach(learner, keep_reference=True)
    assert isinstance(learner.start, FrozenCopy)
    for one in learner.roots():
        torch.testing.assert_close(dict(one.model.state_dict()), expected, atol=0, rtol=0)
    assert all(weight.requires_grad for weight in network.parameters())


def test_an_adapter_lies_above_the_weights_and_names_them_as_its_base(exported, tmp_path):
    network, expected = exported["captioner"]
    learner = Learner(network)
    LoRA(rank=2, weights=str(tmp_path / "captioner")).attach(learner, keep_reference=True)
    below = {name.replace(".base_layer", ""): weight for name, weight in network.base.state_dict().items() if "lora_" not in name}
    torch.testing.assert_close(below, expected, atol=0, rtol=0)
    assert network.base.name_or_path == str(tmp_path / "captioner")
    assert {name for name, weight in network.named_parameters() if weight.requires_grad} == {
        name for name, _ in network.named_parameters() if "lora_" in name
    }


def test_a_memory_plan_reads_no_weights(exported):
    network = exported["captioner"][0].to("meta")
    Full(weights="nowhere/at/all").attach(Learner(network), keep_reference=False)


@pytest.mark.parametrize("kind", ["captioner", "denoiser", "plain"])
def test_what_is_not_all_of_the_model_is_one_line(exported, tmp_path, kind):
    network, _ = exported[kind]
    before = {name: weight.clone() for name, weight in network.model.state_dict().items()}
    (file,) = (tmp_path / kind).glob("*.safetensors")
    state = load_file(file)
    name = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=KEY) as error:
        Full(weights=str(tmp_path / kind)).attach(Learner(network), keep_reference=False)
    assert "\n" not in str(error.value)
    torch.testing.assert_close(dict(network.model.state_dict()), before, atol=0, rtol=0)


def test_an_adapter_where_weights_are_asked_for_is_one_line(tmp_path):
    network, other = (RandomTiny().build().captioner.learner.network for _ in range(2))
    peft.get_peft_model(other.model, peft.LoraConfig(target_modules=default_targets(other.model))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{KEY}=.* holds an adapter.*{KEY.replace('weights', 'adapter')}.*merge: true"):
        Full(weights=str(tmp_path)).attach(Learner(network), keep_reference=False)


def test_a_folder_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=KEY):
        LoRA(weights="outputs/nowhere").attach(Learner(RandomTiny().build().captioner.learner.network), keep_reference=False)
