import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import families
from uae.learner import Learner
from uae.models.captioners.policy import CaptionPolicy
from uae.models.finetune import Full, LoRA
from uae.rehearsal.emu3 import emu3
from uae.rehearsal.janus import janus_pro
from uae.types import Sampling


@pytest.fixture
def rollout(created, images):
    captioner = created("qwen2_5_vl")
    return captioner.sample(captioner.prepare(images), 3, Sampling(1.0, 6), range(6))


def trainable(captioner):
    return {name: p for name, p in captioner.learner.network.model.named_parameters() if p.requires_grad}


def step(captioner, rollout, size=0.05):
    """A step far enough to change log-probs by more than rounding."""
    parameters = list(trainable(captioner).values())
    optimizer = torch.optim.SGD(parameters, lr=size)
    captioner.logprobs(rollout).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def logprobs(captioner, rollout):
    return captioner.logprobs(rollout)


@torch.no_grad()
def reference(captioner, rollout):
    with captioner.learner.reference():
        return captioner.logprobs(rollout)


@pytest.fixture
def adapter(fresh, rollout, tmp_path):
    """A folder with an adapter that has learned something, and the policy's log-probs with it."""
    captioner = copy.deepcopy(fresh)
    LoRA(rank=2).attach(captioner.learner, keep_reference=False)
    step(captioner, rollout, size=0.05)
    step(captioner, rollout, size=0.05)
    captioner.learner.network.model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), logprobs(captioner, rollout)


@pytest.mark.parametrize("finetune", [LoRA(rank=2), LoRA(rank=2, target_modules="all-linear"), Full()])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_gradients_reach_what_trains_and_the_reference_stays(created, images, family, finetune):
    captioner = copy.deepcopy(created(family))
    rollout = captioner.sample(captioner.prepare(images), 3, Sampling(1.0, 6), range(6))
    start = logprobs(captioner, rollout)
    finetune.attach(captioner.learner, keep_reference=True)
    for name, parameter in captioner.learner.network.named_parameters():
        if "lora_B" in name:  # 0 at the start, which hides the gradient of A
            torch.nn.init.normal_(parameter, 0, 0.1)
    reached = []
    for logp_NT in (captioner.logprobs(rollout), families.plain_logprobs(captioner, rollout)):
        captioner.learner.network.zero_grad()
        logp_NT.sum().backward()
        reached.append({n for n, p in captioner.learner.network.model.named_parameters() if p.grad is not None and p.grad.any()})
    assert reached[0] == reached[1]  # a layer of the image tower behind the one that is read has none
    assert reached[0] <= trainable(captioner).keys()
    assert {name for name in trainable(captioner) if "language_model.layers" in name} <= reached[0]
    step(captioner, rollout, size=1e-2)
    assert torch.equal(reference(captioner, rollout), start)
    assert not torch.equal(logprobs(captioner, rollout), start)


# ------------------------------------------------------------------------------------------------------------- LoRA


ATTENTION = {f"self_attn.{x}_proj" for x in "qkvo"}
FEED_FORWARD = {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
LINEAR_ATTENTION = {f"linear_attn.{x}" for x in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")}


def adapted(learner):
    """Names of the maps that have an adapter; A and B must both train, and nothing else."""
    names = {name.replace("base_model.model.", "") for name, p in learner.network.model.named_parameters() if p.requires_grad}
    maps = {name.split(".lora_")[0] for name in names}
    assert names == {f"{name}.lora_{side}.default.weight" for name in maps for side in "AB"}
    return maps


@pytest.mark.parametrize("family", families.FAMILIES)
def test_lora_adapts_the_language_model_only(created, family):
    captioner = copy.deepcopy(created(family))
    LoRA(rank=2).attach(captioner.learner, keep_reference=True)
    mixers = [LINEAR_ATTENTION if family == "qwen3_5" else ATTENTION, ATTENTION]
    expected = {f"model.language_model.layers.{i}.{x}" for i in range(2) for x in mixers[i] | FEED_FORWARD}
    assert adapted(captioner.learner) == expected


@pytest.mark.parametrize(("name", "root"), [("janus", "language_model"), ("emu3", "text_model")])
def test_lora_adapts_the_language_model_of_token_systems_and_not_their_image_tokenizer(name, root):
    model = {"janus": lambda: janus_pro(2, seed=0), "emu3": lambda: emu3(seed=0)}[name]()[0]
    vision = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith("q_proj")}
    assert any(root not in n for n in vision)  # an image tower, or attention of the VQ model, by the same names
    learner = Learner(CaptionPolicy(model))
    LoRA(rank=2).attach(learner, keep_reference=True)
    assert adapted(learner) == {f"model.{root}.layers.{i}.{x}" for i in range(2) for x in ATTENTION | FEED_FORWARD}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_all_linear_adapts_the_image_tower_too_but_not_the_head(created, family):
    captioner = copy.deepcopy(created(family))
    modules = captioner.learner.network.model.named_modules()
    maps = {name for name, module in modules if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    LoRA(rank=2, target_modules="all-linear").attach(captioner.learner, keep_reference=True)
    assert adapted(captioner.learner) == maps
    tower = [name for name in maps if "vis" in name and "language_model" not in name]
    assert len(tower) >= 2 * 4  # blocks, linear maps per block
    assert len(maps) > len(tower) + 12


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_is_float32_beside_bfloat16_and_the_replay_is_exact(fresh, images, checkpointing):
    fresh.learner.network.to(torch.bfloat16)
    fresh.learner.network.gradient_checkpointing = checkpointing
    LoRA(rank=2).attach(fresh.learner, keep_reference=True)
    assert {p.dtype for p in trainable(fresh).values()} == {torch.float32}
    assert {p.dtype for p in fresh.learner.network.parameters() if not p.requires_grad} == {torch.bfloat16}
    rollout = fresh.sample(fresh.prepare(images), 3, Sampling(1.0, 6), range(6))
    for _ in range(2):  # at the start, and with an adapter that does something
        old_NT = logprobs(fresh, rollout)  # without gradient, as a rollout's replay
        assert torch.equal(fresh.logprobs(rollout).detach(), old_NT)  # with gradient, as an update
        assert old_NT.dtype == torch.float32
        step(fresh, rollout)
        step(fresh, rollout)
    assert not torch.equal(old_NT, reference(fresh, rollout))


def test_an_update_far_below_the_resolution_of_bfloat16_is_kept(fresh):
    fresh.learner.network.to(torch.bfloat16)
    LoRA(rank=2).attach(fresh.learner, keep_reference=False)
    weight = next(p for name, p in trainable(fresh).items() if "lora_A" in name)
    before = weight.detach().clone()
    torch.optim.SGD([weight], lr=1e-6).step(lambda: setattr(weight, "grad", torch.ones_like(weight)))
    torch.testing.assert_close(weight, before - 1e-6, rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("keep_reference", [False, True])
def test_what_trains_can_be_counted_without_weights(created, adapter, keep_reference):
    """On the meta device, as a memory plan does."""
    for finetune in (LoRA(rank=2), LoRA(rank=2, target_modules="all-linear"), LoRA(adapter=adapter[0]), Full()):
        real, empty = (copy.deepcopy(created("qwen2_5_vl")) for _ in range(2))
        policy = CaptionPolicy(empty.learner.network.model.to("meta"))
        policy.model.tie_weights()
        skeleton = Learner(policy)
        for learner in (real.learner, skeleton):
            finetune.attach(learner, keep_reference)
        shapes = {name: p.shape for name, p in policy.model.named_parameters() if p.requires_grad}
        assert shapes == {name: p.shape for name, p in trainable(real).items()}
        assert {p.device.type for n, p in policy.named_parameters() if "lora_" not in n} == {"meta"}
        assert len(skeleton.roots()) == len(real.learner.roots())


def test_lora_starts_as_the_model_and_its_reference_stays_there(fresh, rollout):
    start = logprobs(fresh, rollout)
    LoRA(rank=2).attach(fresh.learner, keep_reference=True)
    assert len(fresh.learner.roots()) == 1  # no second copy
    assert torch.equal(logprobs(fresh, rollout), start)
    assert torch.equal(reference(fresh, rollout), start)
    step(fresh, rollout)
    step(fresh, rollout)  # the first moves B only
    assert (logprobs(fresh, rollout) - start).abs().max() > 1e-3
    assert torch.equal(reference(fresh, rollout), start)
    assert len(trainable(fresh)) == 28  # as before


def test_lora_trains_every_factor_and_nothing_else(fresh, rollout):
    before = {name: p.clone() for name, p in fresh.learner.network.model.named_parameters()}
    LoRA(rank=2).attach(fresh.learner, keep_reference=False)
    factors = {name: p.clone() for name, p in trainable(fresh).items()}
    step(fresh, rollout)
    step(fresh, rollout)
    assert not any(torch.equal(p, factors[name]) for name, p in trainable(fresh).items())
    after = fresh.learner.network.base.state_dict()
    for name, p in before.items():
        found = [value for key, value in after.items() if key.replace(".base_layer", "") == name]
        assert torch.equal(found[0], p), name


def test_lora_has_no_dropout(fresh, rollout):
    LoRA(rank=2).attach(fresh.learner, keep_reference=False)
    fresh.learner.network.train()
    assert torch.equal(logprobs(fresh, rollout), logprobs(fresh, rollout))


def test_lora_from_an_adapter_refers_to_that_adapter(fresh, rollout, adapter):
    folder, start = adapter
    base = logprobs(fresh, rollout)
    LoRA(adapter=folder).attach(fresh.learner, keep_reference=True)
    assert torch.equal(logprobs(fresh, rollout), start)
    assert torch.equal(reference(fresh, rollout), start)
    assert (start - base).abs().max() > 1e-3
    names = set(trainable(fresh))
    assert len(names) == 28
    assert all(".default." in name for name in names)
    step(fresh, rollout)
    assert (logprobs(fresh, rollout) - start).abs().max() > 1e-3
    assert torch.equal(reference(fresh, rollout), start)
    assert set(trainable(fresh)) == names  # switching adapters and back leaves what trains as it was
    step(fresh, rollout)
    assert torch.equal(reference(fresh, rollout), start)


def test_lora_from_an_adapter_keeps_no_second_one_unasked(fresh, rollout, adapter):
    LoRA(adapter=adapter[0]).attach(fresh.learner, keep_reference=False)
    assert set(fresh.learner.network.model.peft_config) == {"default"}
    assert len(trainable(fresh)) == 28
    with pytest.raises(RuntimeError, match="keep_reference"), fresh.learner.reference():
        pass  # the model without the adapter is not where the run started


def test_an_error_inside_the_reference_leaves_the_policy_in_place(fresh, rollout, adapter):
    LoRA(adapter=adapter[0]).attach(fresh.learner, keep_reference=True)
    step(fresh, rollout)
    moved = logprobs(fresh, rollout)
    with pytest.raises(KeyError), fresh.learner.reference():
        raise KeyError
    assert torch.equal(logprobs(fresh, rollout), moved)
    assert len(trainable(fresh)) == 28


@pytest.mark.parametrize("wrong", [{"target_modules": ".*nowhere"}, {"rank": 0}])
def test_lora_that_matches_nothing_is_an_error(fresh, wrong):
    (key, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=rf"^model\.init_args\.finetune\.init_args: .*{key}='?{value}"):
        LoRA(**wrong).attach(fresh.learner, keep_reference=False)


def test_what_is_said_of_an_adapter_must_be_as_in_its_file(fresh, adapter, rollout):
    folder, start = adapter
    for key, wrong, written in (("rank", 16, 2), ("alpha", 2, 32), ("target_modules", ".*q_proj", "")):
        finetune = LoRA(adapter=folder, **{key: wrong})
        finetune.key = "model.init_args.image_finetune.init_args"
        said = rf"image_finetune\.init_args\.{key}=.*, but .* has {written}.*; allowed: {written}.*, or null in a file"
        with pytest.raises(ValueError, match=said):
            finetune.attach(copy.deepcopy(fresh).learner, keep_reference=False)
    LoRA(rank=2, alpha=32, adapter=folder).attach(fresh.learner, keep_reference=True)
    assert torch.equal(logprobs(fresh, rollout), start)


def changed(folder, change):
    """The adapter with other settings or factors."""
    config, weights = Path(folder, "adapter_config.json"), Path(folder, "adapter_model.safetensors")
    settings, factors = json.loads(config.read_text()), load_file(weights)
    change(settings, factors)
    config.write_text(json.dumps(settings))
    save_file(factors, weights)


FAULTS = {
    "lacks 1 factors": lambda settings, factors: factors.popitem(),
    "has no layer of this model for 1 factors": lambda settings, factors: factors.update(
        {f"base_model.model.other.{name}": value.clone() for name, value in list(factors.items())[:1]}
    ),
    "cannot be loaded into this model: .*size mismatch": lambda settings, factors: settings.update(r=4),
    "is an adapter of type IA3; allowed: LORA": lambda settings, factors: settings.update(peft_type="IA3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_would_be_loaded_in_part_is_refused(fresh, adapter, fault):
    changed(adapter[0], FAULTS[fault])
    with pytest.raises(ValueError, match=rf"^model\.init_args\.finetune\.init_args\.adapter='.*' {fault}"):
        LoRA(adapter=adapter[0]).attach(fresh.learner, keep_reference=False)


def test_a_folder_without_an_adapter_is_one_line(fresh, tmp_path):
    with pytest.raises(ValueError, match=r"init_args\.adapter='.*' cannot be loaded into this model: .*adapter_config.json"):
        LoRA(adapter=str(tmp_path)).attach(fresh.learner, keep_reference=False)
    with pytest.raises(FileNotFoundError, match="nothing at './nowhere'"):
        LoRA(adapter="./nowhere").attach(fresh.learner, keep_reference=False)


def test_dropout_of_an_adapters_file_is_off(fresh, adapter, rollout):
    changed(adapter[0], lambda settings, factors: settings.update(lora_dropout=0.5))
    LoRA(adapter=adapter[0]).attach(fresh.learner, keep_reference=True)
    fresh.learner.network.train()
    assert torch.equal(logprobs(fresh, rollout), adapter[1])
    assert torch.equal(reference(fresh, rollout), adapter[1])


# ------------------------------------------------------------------------------------------------------------- Full


@pytest.mark.parametrize("family", families.FAMILIES)
def test_full_leaves_the_image_tower_frozen(created, family):
    captioner = copy.deepcopy(created(family))
    Full().attach(captioner.learner, keep_reference=False)
    model = captioner.learner.network.model.model
    tower = model.visual if "qwen" in family else model.vision_tower
    assert not any(p.requires_grad for p in tower.parameters())
    assert all(p.requires_grad for p in model.language_model.parameters())
    assert captioner.learner.network.model.get_output_embeddings().weight.requires_grad


def test_full_trains_what_it_is_told(fresh):
    Full(trainable=r"layers\.1\.mlp").attach(fresh.learner, keep_reference=False)
    assert len(trainable(fresh)) == 3
    assert all("language_model.layers.1.mlp" in name for name in trainable(fresh))


def test_full_keeps_a_frozen_copy_only_when_asked(fresh, rollout):
    start = logprobs(fresh, rollout)
    lean = copy.deepcopy(fresh)
    Full().attach(lean.learner, keep_reference=False)
    assert len(lean.learner.roots()) == 1
    with pytest.raises(RuntimeError, match="keep_reference"), lean.learner.reference():
        pass
    Full().attach(fresh.learner, keep_reference=True)
    assert torch.equal(reference(fresh, rollout), start)
    step(fresh, rollout, size=1e-3)
    assert (logprobs(fresh, rollout) - start).abs().max() > 1e-3
    assert torch.equal(reference(fresh, rollout), start)
    assert not any(p.requires_grad or p.grad is not None for p in fresh.learner.start.network.parameters())
    mine = {p.data_ptr() for p in fresh.learner.network.parameters()}
    assert not mine & {p.data_ptr() for p in fresh.learner.start.network.parameters()}
    assert fresh.learner.network.model.get_output_embeddings().weight is fresh.learner.network.model.get_input_embeddings().weight


def test_an_error_inside_the_copy_leaves_the_policy_in_place(fresh):
    Full().attach(fresh.learner, keep_reference=True)
    policy = fresh.learner.network
    with fresh.learner.reference():
        assert fresh.learner.network is not policy
    with pytest.raises(KeyError), fresh.learner.reference():
        raise KeyError
    assert fresh.learner.network is policy


def test_full_that_matches_nothing_is_an_error(fresh):
    with pytest.raises(ValueError, match="finetune.init_args.trainable='nowhere'"):
        Full(trainable="nowhere").attach(fresh.learner, keep_reference=False)
