"""Recomputing in the backward pass: the same numbers, out of less memory."""

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch

from tests.models import families
from uae.models.captioners import policy as caption_policy
from uae.models.finetune import Full, LoRA
from uae.strategy import shard
from uae.types import Sampling


@pytest.fixture(scope="module")
def deep():
    """Captioners of four text layers, by family, and a rollout of each. Not to be changed."""
    cache = {}

    def create(family):
        if family not in cache:
            captioner = families.create(family, layers=4)
            generator = torch.Generator().manual_seed(0)
            images = [torch.rand(3, 24, width, generator=generator) for width in (24, 40)]
            rollout = captioner.sample(captioner.prepare(images), 3, Sampling(0.7, 8), range(6))
            cache[family] = captioner, rollout
        return cache[family]

    return create


@pytest.fixture
def caches(monkeypatch):
    """Every prompt cache that is made."""
    made, honest = [], caption_policy.prompt_cache

    def remember(model):
        made.append(honest(model))
        return made[-1]

    monkeypatch.setattr(caption_policy, "prompt_cache", remember)
    return made


def gradients(captioner, rollout):
    """Log-probs and their gradients by name."""
    captioner.learner.network.zero_grad()
    logp_NT = captioner.logprobs(rollout)
    generator = torch.Generator().manual_seed(0)
    (logp_NT * torch.randn(logp_NT.shape, generator=generator)).sum().backward()
    return logp_NT.detach(), {n: p.grad for n, p in captioner.learner.network.named_parameters() if p.grad is not None}


def bytes_kept(captioner, rollout, caches):
    """Memory between forward and backward pass, weights aside: what autograd saves, and the prompt's cache."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    caches.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logp_NT = captioner.logprobs(rollout)
    kept += [x for cache in caches for layer in cache.layers for x in (layer.keys, layer.values)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    for parameter in captioner.learner.network.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del logp_NT
    return sum(storages.values())


@pytest.mark.parametrize("finetune", [LoRA(rank=2), LoRA(rank=2, target_modules="all-linear"), Full(".*")])
@pytest.mark.parametrize("family", families.FULL_ATTENTION)
def test_checkpointing_changes_no_number_and_keeps_less(deep, caches, family, finetune):
    captioner, rollout = deep(family)
    captioner = copy.deepcopy(captioner)
    finetune.attach(captioner.learner, keep_reference=False)
    for name, parameter in captioner.learner.network.named_parameters():
        if "lora_B" in name:  # 0 at the start, which would hide the gradient of A
            torch.nn.init.normal_(parameter, 0, 0.1)
    plain_NT, plain = gradients(captioner, rollout)
    before = bytes_kept(captioner, rollout, caches)
    assert not caches
    captioner.learner.network.gradient_checkpointing = True
    for train in (False, True):
        captioner.learner.network.train(train)
        logp_NT, recomputed = gradients(captioner, rollout)
        assert torch.equal(logp_NT, plain_NT)
        assert recomputed.keys() == plain.keys()
        assert len(plain) > 30
        for name, gradient in plain.items():
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))
    assert bytes_kept(captioner, rollout, caches) < before / 4
    assert len(caches) == 1


def test_layers_run_again_only_where_there_is_a_gradient(deep, caches):
    captioner, rollout = deep("qwen2_5_vl")
    captioner = copy.deepcopy(captioner)
    captioner.learner.network.gradient_checkpointing = True
    calls = Counter()
    for layer in captioner.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, _: calls.update([module]))
    with torch.no_grad():
        captioner.logprobs(rollout)
    assert set(calls.values()) == {2}  # the prompt, and the captions behind it
    assert not caches  # the library's own
    logp_NT = captioner.logprobs(rollout)
    assert set(calls.values()) == {4}
    logp_NT.sum().backward()
    assert set(calls.values()) == {6}
    assert len(calls) == 4


def test_the_cache_survives_recomputing_and_nothing_survives_the_graph(deep, caches):
    """Without the garbage collector: on a GPU, a cycle would be memory that is missing for a while."""
    captioner, rollout = deep("qwen2_5_vl")
    captioner = copy.deepcopy(captioner)
    captioner.learner.network.gradient_checkpointing = True
    gc.collect()
    gc.disable()
    try:
        logp_NT = captioner.logprobs(rollout)
        before = [layer.keys for layer in caches[0].layers]
        logp_NT.sum().backward()
        assert all(layer.keys is keys for layer, keys in zip(caches[0].layers, before, strict=True))
        tensors = [weakref.ref(keys) for keys in before]
        caches.clear()
        del before, logp_NT
        assert [tensor() for tensor in tensors] == [None] * 4
    finally:
        gc.enable()


def test_the_model_is_left_as_it_was(deep):
    captioner, rollout = deep("llava")
    captioner = copy.deepcopy(captioner)
    captioner.learner.network.gradient_checkpointing = True
    layer = captioner.language_model.layers[1]
    layer.forward = own = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)  # some libraries do so
    captioner.logprobs(rollout)
    with pytest.raises(IndexError):  # an error inside, too
        captioner.learner.network(rollout.context, rollout.tokens_NT + 10**6, 3, 1.0, rollout.mask_RS.sum(1).long())
    wrapped = [module for module in captioner.learner.network.modules() if "forward" in module.__dict__]
    assert wrapped == [layer]
    assert layer.forward is own


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # users will meet both names
def test_the_librarys_own_checkpointing_is_refused(deep):
    """It drops the cache, in training mode only; log-probs would silently belong to captions without a prompt."""
    captioner, rollout = deep("qwen2_5_vl")
    captioner = copy.deepcopy(captioner)
    captioner.learner.network.model.gradient_checkpointing_enable()
    for act in (captioner.logprobs, lambda x: captioner.sample(x.context, 2, Sampling(), range(4))):
        with pytest.raises(RuntimeError, match="set model.init_args.system.init_args.reading.gradient_checkpointing to true"):
            act(rollout)


@pytest.fixture
def mesh(tmp_path):
    """One process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("finetune", [LoRA(rank=2), Full(".*")])
def test_checkpointing_a_sharded_policy(deep, mesh, finetune):
    """Layers are gathered again for the second computation, and gradients reduced after it."""
    captioner, rollout = deep("qwen2_5_vl")
    captioner = copy.deepcopy(captioner)
    finetune.attach(captioner.learner, keep_reference=False)
    plain_NT, plain = gradients(captioner, rollout)
    captioner.learner.network.gradient_checkpointing = True
    shard(captioner.learner.network, mesh)
    logp_NT, sharded = gradients(captioner, rollout)
    torch.testing.assert_close(logp_NT, plain_NT, atol=1e-6, rtol=0)
    assert sharded.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(sharded[name].full_tensor(), gradient, rtol=1e-5, atol=2e-5)  # in passes of other sizes
