"""The plan of images drawn token by token, against bytes that are really there: tiny Janus, Emu3 and X-Omni on the CPU."""

import copy

import pytest

from tests.memory.test_memory import kept_by, planned, rows_of
from tests.models.tokens.x_omni_cases import tiny_x_omni
from uae.grpo import GRPOLoss
from uae.memory.counting import image_update_bytes, text_config
from uae.memory.estimates import kv_bytes
from uae.models.captioners.captioner import HFCaptioner
from uae.models.finetune import Full, LoRA
from uae.models.tokens import emu3, janus
from uae.models.tokens import policy as image_tokens
from uae.models.tokens.policy import TokenSampling
from uae.rehearsal.emu3 import emu3 as tiny_emu3
from uae.rehearsal.janus import janus_pro as tiny_janus_pro
from uae.systems.emu3 import Emu3
from uae.systems.janus_pro import JanusPro

TEXTS = ["a red ring", "a large blue square at the top left of a navy background"]
UNIFY = {
    "janus": lambda sampling: janus.unify(HFCaptioner(*tiny_janus_pro(2, seed=0), "Describe."), sampling),
    "emu3": lambda sampling: emu3.unify(HFCaptioner(*tiny_emu3(seed=0), "Describe."), 32, 40, sampling),
    "x_omni": tiny_x_omni,
}
WRITTEN = {"janus": 16, "emu3": 4 * (5 + 1) - 1, "x_omni": 4 * 5}  # an end of line behind each row but the last


def drawing(name, sampling=TokenSampling(5.0)):  # noqa: B008
    umm = UNIFY[name](sampling)
    return umm, umm.conditioner.encode(TEXTS)


@pytest.mark.parametrize("name", UNIFY)
@pytest.mark.parametrize(("guidance", "copies"), [(5.0, 2), (1.0, 1)])
def test_the_cache_is_exact(name, guidance, copies, monkeypatch):
    caches, create = [], image_tokens.fixed_cache
    monkeypatch.setattr(image_tokens, "fixed_cache", lambda *a: caches.append(create(*a)) or caches[-1])
    umm, condition = drawing(name, TokenSampling(guidance))
    umm.renderer.sample(condition, [1, 2])
    (cache,) = caches
    found = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    length = condition.ids_NL.shape[1] + WRITTEN[name] - 1
    assert kv_bytes(umm.captioner.learner.network.base, 2 * copies, length) == found


@pytest.mark.parametrize("name", UNIFY)
@pytest.mark.parametrize("finetune", [LoRA(rank=4), Full("language_model|text_model|model.layers")], ids=["lora", "full"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("mode", "copies"), [("guided", 2), ("guided_detach_uncond", 1)])
def test_activations_are_what_autograd_keeps(name, finetune, recompute, mode, copies):
    umm, condition = drawing(name, TokenSampling(5.0, cfg_logprob=mode))
    finetune.attach(umm.captioner.learner, keep_reference=False)
    drawn, policy = umm.renderer.sample(condition, [1, 2]), umm.captioner.learner.network

    def saved(again):
        policy.gradient_checkpointing = again
        return kept_by(policy, lambda: umm.renderer.logprobs(drawn))

    blocks = text_config(policy.base).num_hidden_layers
    found = saved(True) + saved(False) / blocks if recompute else saved(False)  # one of the blocks is there again
    policy.gradient_checkpointing = recompute
    skeleton = copy.deepcopy(policy).to("meta")
    estimate = 2 * image_update_bytes(skeleton, condition.ids_NL.shape[1], WRITTEN[name], copies)
    assert found / 1.2 < estimate < found * 1.2


@pytest.mark.parametrize(("system", "length", "codes"), [(JanusPro(), 576, 16384), (Emu3(height=64, width=128), 8 * 17 - 1, 32768)])
def test_rows_by_what_trains(system, length, codes):
    """Two images x 3 captions x 2 reconstructions in 2 mini-batches; prompts of 12 + 64 tokens."""
    rows = {
        train: rows_of(planned(system=system, train=train, reconstructions=2, batch_size=2))
        for train in ("captions", "images", "both")
    }
    policy = system.blueprint().policy
    for each in rows.values():
        assert each["key-value cache of 8 images" if length < 500 else "key-value cache of 12 images"].whole == kv_bytes(
            policy, 2 * min(12, system.rows), 76 + length - 1
        )
        assert each["logits of an image token"].whole == 20 * min(12, system.rows) * codes
        assert each["reconstructions"].phases == ("render", "reward")
    learning = {"image activations", "image head", "image replay buffers"}
    assert not learning & rows["captions"].keys()
    assert learning <= rows["both"].keys() & rows["images"].keys()
    assert "activations" in rows["both"]
    assert "activations" not in rows["images"]  # no captions are scored
    one = rows_of(planned(system=system, train="both", reconstructions=1, batch_size=2))
    assert rows["both"]["image activations"].whole == 2 * one["image activations"].whole > 0
    assert rows["both"]["image activations"].phases == ("update",)


@pytest.mark.parametrize(("train", "copied"), [("captions", False), ("images", True), ("both", True)])
def test_a_kl_on_images_alone_copies_the_shared_network(train, copied):
    changes = {"finetune": Full(), "loss": GRPOLoss(beta=0.0), "image_loss": GRPOLoss(beta=0.1), "train": train}
    assert ("reference copy" in rows_of(planned(system=JanusPro(), batch_size=2, **changes))) == copied
