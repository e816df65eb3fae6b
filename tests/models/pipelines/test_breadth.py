"""Pipelines that stand for the kinds: each draws and trains as its own call does, or is refused in one line."""

import functools
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.breadth.checkpoints.catalog import CATALOG
from benchmarks.breadth.checks import SEEDS, SIDE, TEXTS, measured
from benchmarks.breadth.pipelines import reasons, verdict
from uae.models.conditioners.states import EmbeddingCondition, TextCondition
from uae.models.conditioners.text_encoders import PipelineTextConditioner
from uae.models.finetune import attention_layers
from uae.models.flow.policy import Exploration, FlowPolicy
from uae.models.pipelines.loading import components_of, load_pipeline
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.rendering import Rendering
from uae.rehearsal.language_models import LANGUAGE_MODELS
from uae.systems.blueprints import pipeline_skeletons
from uae.weights.placement import Placement

FLOAT32 = Placement("float32")
ROOM = tempfile.TemporaryDirectory(prefix="breadth_")  # is removed when the tests end
deprecated_parents = pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated:FutureWarning")  # of PRX, in diffusers
KINDS = {
    "ZImage": "works",  # a list of embeddings, guidance from 0
    "Flux2Klein": "works",  # latents in the loop differ from those that are given and returned
    "QwenImage21": "works",  # a processor, transparency, no mask, a cache of keys and values
    "Krea2": "works",  # padding in the middle, states of several layers, a mask of type bool
    "CogView4": "works",  # padding that nothing masks
    "ErnieImage": "works",  # no prepare_latents, a rewriter
}


@functools.cache
def folder(name):
    path = Path(ROOM.name, name.replace(", ", "-"))
    CATALOG[name].write(path)
    return path


@functools.cache
def captioner():
    path = Path(ROOM.name, "captioner")
    LANGUAGE_MODELS["Qwen/Qwen2.5-VL-3B-Instruct"](path)
    return path


def load(name):
    return load_pipeline(str(folder(name)), FLOAT32)


def rendering(guidance=1.0, steps=4, side=SIDE):
    return Rendering(side, side, steps=steps, guidance=guidance, placement=FLOAT32)


@pytest.mark.parametrize("name", KINDS)
def test_pixels_ratio_and_gradient_are_those_of_the_pipelines_own_call(name):
    found = measured(folder(name), captioner(), CATALOG[name])
    assert (verdict(found), reasons(found)) == (KINDS[name], "")


def test_another_size_than_asked_for_is_an_error(monkeypatch):
    renderer = DiffusersRenderer(load("ZImage"), rendering())
    decode = renderer.pipe.vae.decode
    monkeypatch.setattr(renderer.pipe.vae, "decode", lambda *given, **named: (decode(*given, **named)[0][..., :-8, :],))
    with pytest.raises(ValueError, match=r"drew images of 24 x 32 pixels where 32 x 32 were asked for; change .*height"):
        renderer.render(TextCondition(TEXTS[:1]), SEEDS[:1])


@pytest.mark.parametrize("name", ["HiDreamImage", "Kandinsky5T2I"])
def test_pipelines_that_choose_their_size_obey(name):
    pipe = load(name)
    images = DiffusersRenderer(pipe, Rendering(32, 48, steps=1, placement=FLOAT32)).render(TextCondition(TEXTS[:1]), SEEDS[:1])
    assert images.shape == (1, 3, 32, 48)


def test_tokens_drawn_anew_in_every_call_are_no_policy_and_leave_the_global_generator():
    renderer = DiffusersRenderer(load("GlmImage"), rendering(steps=2))
    before = torch.get_rng_state()
    one, again = (renderer.render(TextCondition(TEXTS[:1]), SEEDS[:1]) for _ in range(2))
    assert torch.equal(one, again)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"GlmImagePipeline cannot be trained step by step: it draws tokens .* change model"):
        FlowPolicy(renderer)


def test_guidance_that_would_be_ignored_is_refused():
    with pytest.raises(ValueError, match=r"guidance=3.0, but this Flux2KleinPipeline is distilled .* set .*guidance to 1"):
        DiffusersRenderer(load("Flux2Klein, distilled"), rendering(3.0))
    pipe = load("HunyuanImage")
    with pytest.raises(ValueError, match=r"guidance=2.0, but HunyuanImagePipeline is guided by guider .*allowed: 1, 3; change"):
        DiffusersRenderer(pipe, rendering(2.0))
    with pytest.raises(ValueError, match=r"its guider remembers earlier steps; allowed: .*guidance=1"):
        FlowPolicy(DiffusersRenderer(pipe, rendering(3.0)))
    FlowPolicy(DiffusersRenderer(pipe, rendering(1.0)), Exploration(window=1))
    with pytest.raises(ValueError, match=r"steps=4, but SanaSprintPipeline takes exactly 2 steps; change .*steps"):
        DiffusersRenderer(load("SanaSprint"), rendering())


def test_a_negative_of_another_length_is_refused_where_both_are_one_batch():
    pipe = load("AuraFlow")
    condition = EmbeddingCondition(torch.randn(2, 5, 32), torch.tensor([[1] * 5, [1] * 3 + [0] * 2]))
    negative = EmbeddingCondition(torch.randn(1, 4, 32), torch.ones(1, 4).long())
    renderer = DiffusersRenderer(pipe, rendering(3.0), negative)
    with pytest.raises(ValueError, match=r"AuraFlowPipeline draws under guidance from .* have 4 and 5 tokens; set .*guidance to 1"):
        renderer.render(condition.index([0]), SEEDS[:1])
    plain = DiffusersRenderer(pipe, rendering(1.0))
    together, alone = plain.render(condition, SEEDS[:2]), plain.render(condition.index([1]), SEEDS[1:2])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)


def test_a_safety_checker_is_left_out_and_the_gradient_passes():
    pipe = load("StableDiffusion")
    assert pipe.safety_checker is None
    condition = PipelineTextConditioner(pipe).encode(TEXTS[:1])
    embeds = condition.embeds_NLD.clone().requires_grad_(True)
    image = DiffusersRenderer(pipe, rendering()).render(EmbeddingCondition(embeds, condition.mask_NL), SEEDS[:1], grad=True)
    (gradient,) = torch.autograd.grad(image.mean(), embeds)
    assert 0 < gradient.abs().max() < float("inf")


def test_a_list_of_numbers_is_no_component():
    index = json.loads((folder("Krea2") / "model_index.json").read_text())
    index |= {"pair_of_numbers": [3, 4], "absent": [None, None]}
    assert index["text_encoder_select_layers"] == [0, 1, 2]
    names = {"scheduler", "vae", "text_encoder", "tokenizer", "transformer", "absent"}
    assert set(components_of(index)) == names


@deprecated_parents
@pytest.mark.parametrize("name", ["ErnieImage", "GlmImage", "HunyuanImage", "LongCatImage", "PRX"])
def test_the_memory_plan_has_the_networks_that_are_loaded(name):
    def sizes(parts):
        networks = {part: network for part, network in parts.items() if isinstance(network, torch.nn.Module)}
        return {part: sum(weight.numel() for weight in network.parameters()) for part, network in networks.items()}

    assert sizes(pipeline_skeletons(str(folder(name)))) == sizes(load(name).components)


LAYERS = {
    "ZImage": {"to_q", "to_k", "to_v", "to_out.0"},
    "PRX": {"img_qkv_proj", "txt_kv_proj", "to_out.0"},
    "Kandinsky5T2I": {"to_query", "to_key", "to_value", "out_layer"},
}


@deprecated_parents
@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_finds_the_attention_of_a_denoiser_by_its_type(name):
    transformer = load(name).transformer
    expression = attention_layers(transformer)
    found = {path for path, _ in transformer.named_modules() if re.fullmatch(expression, path)}
    assert {layer for layer in LAYERS[name] if any(path.endswith(f".{layer}") for path in found)} == LAYERS[name]
    assert all(isinstance(transformer.get_submodule(path), torch.nn.Linear) for path in found)
    assert not any("feed_forward" in path or "mlp" in path for path in found)
