"""The plan against bytes that are really there: a tiny captioner's update, cache, gradients and optimizer states."""

import copy
import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.memory.planned import PROMPT, Planned
from tests.models import families
from uae.encoders import HFEncoder
from uae.grpo import GRPOLoss
from uae.memory import plan
from uae.memory.counting import update_bytes
from uae.memory.estimates import kv_bytes, optimizer_bytes, vision_bytes
from uae.memory.phases import Sizes, rollout_rows, update_rows
from uae.memory.processes import processes_of
from uae.memory.table import PHASES
from uae.miniature.data import SceneData
from uae.models.finetune import Full, LoRA
from uae.models.merged import merged
from uae.module import UnifiedGRPO
from uae.rewards import EncoderSimilarity, TextFidelity, VLMJudge, WeightedReward
from uae.strategy import FSDP2Strategy
from uae.systems.blueprints import Blueprint
from uae.types import Sampling
from uae.weights.placement import Placement

GROUP, TOKENS = 3, 12
CLIP = "openai/clip-vit-large-patch14"


def module(system=None, **changes):
    arguments = {
        "system": system or Planned(),
        "reward": WeightedReward({"clip": EncoderSimilarity(HFEncoder(CLIP))}, {"clip": 1.0}),
        "finetune": LoRA(rank=4),
        "loss": GRPOLoss(),
        "sampling": Sampling(max_tokens=TOKENS),
        "group": GROUP,
        "mini_batches": 2,
    }
    return UnifiedGRPO(**{**arguments, **changes})


def planned(trainer=None, batch_size=4, **changes):
    settings = {"accelerator": "gpu", "devices": 2, **(trainer or {})}
    return plan(module(**changes), SceneData(batch_size=batch_size, eval_batch_size=2), settings)


def rows_of(a_plan):
    """By name, without dtype; the first of a name is the thing itself."""
    return {row.name.split(",")[0]: row for row in reversed(a_plan.rows)}


def real(finetune, recompute=False):
    """A captioner with weights, finetuned as the run would be, and the rollout of two images."""
    captioner = families.create("qwen2_5_vl")
    captioner.learner.network.gradient_checkpointing = recompute
    finetune.attach(captioner.learner, keep_reference=False)
    context = captioner.prepare(torch.rand(2, 3, 24, 24))
    tokens = torch.randint(8, 20, (2 * GROUP, TOKENS))
    return captioner.learner.network, context, tokens


def really_saved(policy, context, tokens):
    """Of the update's forward."""
    return kept_by(policy, lambda: policy(context, tokens, GROUP, 1.0, torch.full((len(tokens),), TOKENS)))


def kept_by(policy, forward):
    """Bytes of every tensor that autograd keeps, by address; the policy's own weights aside."""
    theirs = {weight.untyped_storage().data_ptr() for weight in policy.state_dict(keep_vars=True).values()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("finetune", [LoRA(rank=4), Full("language_model")], ids=["lora", "full"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_activations_are_what_autograd_keeps(finetune, recompute):
    policy, context, tokens = real(finetune, recompute)
    prompt = context.rows["input_ids"].shape[1]
    assert prompt == PROMPT
    skeleton = copy.deepcopy(policy).to("meta")
    estimate = 2 * update_bytes(skeleton, prompt, TOKENS, GROUP)
    saved = really_saved(policy, context, tokens)
    if recompute:  # one of two blocks is there again when its turn comes
        policy.gradient_checkpointing = False
        saved += (really_saved(policy, context, tokens)) / 2
    assert saved / 1.2 < estimate < saved * 1.2


def test_adapters_and_recomputation_change_the_count_in_the_right_direction():
    sizes = {}
    for finetune, recompute in itertools.product((LoRA(rank=4), Full("language_model")), (False, True)):
        policy = real(finetune, recompute)[0].to(torch.bfloat16).to("meta")
        sizes[type(finetune).__name__, recompute] = update_bytes(policy, 400, 200, 8)
    assert sizes["LoRA", True] < 0.6 * sizes["LoRA", False]  # of two layers, one is whole
    assert sizes["Full", True] < 0.6 * sizes["Full", False]


def test_the_cache_is_exact():
    policy, context, tokens = real(LoRA(rank=4))
    with torch.no_grad():
        prefix = policy.prefill(context).expand(GROUP)
        policy.advance(prefix, tokens)
    found = sum(x.nbytes for layer in prefix.cache.layers for x in (layer.keys, layer.values))
    assert kv_bytes(policy.base, 2 * GROUP, PROMPT + TOKENS) == found


def in_rollout(policy, trainer=None, pixels=576):
    """Rows of the rollout of two images for a policy with weights."""
    sizes = Sizes(2, GROUP, 2 * GROUP, 1, PROMPT, TOKENS, pixels)
    blueprint = Blueprint(policy.base)
    return {row.name: row for row in rollout_rows(policy, blueprint, sizes, processes_of({"devices": 1, **(trainer or {})}))}


def test_while_captions_are_drawn_the_cache_is_there_at_its_full_length():
    policy, context, tokens = real(LoRA(rank=4))
    with torch.no_grad():
        prefix = policy.prefill(context).expand(GROUP, room=TOKENS - 1)
        sizes = []
        for step in range(TOKENS - 1):
            policy.advance(prefix, tokens[:, step, None])
            sizes.append(sum(x.untyped_storage().nbytes() for layer in prefix.cache.layers for x in (layer.keys, layer.values)))
    assert set(sizes) == {in_rollout(policy)["key-value cache"].whole}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_into_copies_where_the_sum_is_exact(dtype):
    policy = real(LoRA(rank=4))[0].to(dtype)
    with merged(policy.model):
        copies = [part for part in policy.modules() if type(part).__name__ == "_Sum"]
    row = in_rollout(policy)["weights merged with the adapter"]
    assert row.phases == ("caption",)
    assert row.whole == sum(part.weight.nbytes for part in copies)
    assert (row.whole > 0) == (dtype == torch.float32)
    assert in_rollout(policy, {"precision": "bf16-mixed"})["weights merged with the adapter"].whole == 0
    for gathered, sharded in ((None, row.whole), ("float32", row.whole), ("bfloat16", 0)):
        settings = {"strategy": FSDP2Strategy(param_dtype=gathered)}
        assert in_rollout(policy, settings)["weights merged with the adapter"].sharded == sharded


def test_what_a_frozen_tower_saw_is_kept_and_the_tower_does_not_run_again(monkeypatch):
    captioner, looks = families.create("qwen2_5_vl"), []
    policy = captioner.learner.network
    LoRA(rank=4).attach(captioner.learner, keep_reference=False)
    rollout = captioner.sample(captioner.prepare(torch.rand(2, 3, 24, 24)), GROUP, Sampling(max_tokens=TOKENS), range(6))
    row = in_rollout(policy)["image features"]
    assert row.whole == sum(x.nbytes for image in rollout.context.features.rows for x in image)
    assert row.phases == ()
    tower = policy.base.model.visual
    monkeypatch.setattr(tower, "forward", lambda *args, **kwargs: looks.append(args))
    captioner.logprobs(rollout).sum().backward()
    assert not looks
    sizes = Sizes(2, GROUP, 6, 1, PROMPT, TOKENS, 10**6)
    skeleton = copy.deepcopy(policy).to("meta")
    saved = update_bytes(skeleton, PROMPT, TOKENS, GROUP)
    assert {row.name: row.whole for row in update_rows(skeleton, sizes)}["activations"] == saved
    seeing = real(LoRA(rank=4, target_modules="all-linear"))[0].to("meta")
    assert in_rollout(seeing)["image features"].whole == 0
    tower_alone = vision_bytes(seeing.base, 10**6, True, False)
    activations = {row.name: row.whole for row in update_rows(seeing, sizes)}["activations"]
    assert activations == update_bytes(seeing, PROMPT, TOKENS, GROUP) + tower_alone


@pytest.mark.parametrize("finetune", [LoRA(rank=4), Full("language_model")], ids=["lora", "full"])
def test_weights_gradients_and_optimizer_states_are_exact(finetune):
    rows = rows_of(planned(finetune=finetune, trainer={"devices": 1}))
    policy, context, tokens = real(finetune)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    policy(context, tokens, GROUP, 1.0, torch.full((len(tokens),), TOKENS)).sum().backward()
    assert all(weight.grad is not None for weight in trained)
    optimizer.step()
    assert rows["policy"].trainable == sum(weight.numel() for weight in trained)
    assert rows["policy"].parameters == sum(weight.numel() for weight in policy.parameters())
    weights = sum(weight.nbytes for weight in policy.parameters()) + sum(x.nbytes for x in policy.model.buffers())
    assert rows["policy"].whole == weights
    assert rows["gradients"].whole == sum(weight.grad.nbytes for weight in trained)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert rows["optimizer states"].whole == sum(value.nbytes for value in states)


def test_an_optimizer_is_asked_not_assumed():
    weight = torch.nn.Parameter(torch.empty(100, dtype=torch.bfloat16, device="meta"))
    assert optimizer_bytes(torch.optim.SGD([weight], lr=1.0)) == (0, True)
    assert optimizer_bytes(torch.optim.SGD([weight], lr=1.0, momentum=0.9)) == (200, True)
    assert optimizer_bytes(torch.optim.AdamW([weight])) == (2 * 200 + 4, True)

    class EightBit(torch.optim.SGD):
        def step(self):
            raise RuntimeError("needs a GPU")

    assert optimizer_bytes(EightBit([weight], lr=1.0)) == (800, False)


def test_shared_towers_count_once_and_fsdp_shares_what_trains():
    from uae.metrics import UnifiedScore

    score = UnifiedScore({"again": HFEncoder(CLIP), "half": HFEncoder(CLIP, placement=Placement("bfloat16"))})
    changes = {"finetune": Full("language_model"), "loss": GRPOLoss(beta=0.1)}
    whole = planned({"strategy": "fsdp2"}, unified_score=score, **changes)
    towers = {row.name: row.whole for row in whole.rows if row.name.startswith("encoder ") and row.parameters}
    assert set(towers) == {"encoder clip, float32", "encoder half, bfloat16"}
    assert towers["encoder clip, float32"] == pytest.approx(2 * towers["encoder half, bfloat16"], rel=1e-3)
    rows = rows_of(whole)
    for name in ("policy", "reference copy", "gradients", "optimizer states"):
        assert rows[name].sharded == pytest.approx(rows[name].whole / 2, rel=1e-3)
    assert rows["policy"].phases == rows["gradients"].phases == ()
    assert rows["policy"].whole == rows["reference copy"].whole
    kept = rows_of(planned({"strategy": "fsdp2", "accumulate_grad_batches": 2}, **changes))["gradients"]
    assert kept.sharded == kept.whole  # nothing is reduced before the last batch of the window
    buckets = rows_of(planned({"strategy": "ddp"}, **changes))["gradients"]
    assert buckets.whole == 2 * kept.whole


def test_the_networks_of_rewards_that_are_not_counted_are_named():
    parts = {"clip": EncoderSimilarity(HFEncoder(CLIP)), "text": TextFidelity("a/reader"), "judge": VLMJudge("a/judge")}
    reward = WeightedReward(parts, dict.fromkeys(parts, 1.0))
    assert planned(reward=reward).header.endswith(", not counting the networks of the rewards text, judge")
    assert "not counting" not in planned().header


def test_offloaded_parts_are_there_in_their_phase_only_and_others_not_at_all():
    totals = {}
    for name, system in {"here": Planned(), "away": Planned(offload=True), "other": Planned(device="cuda:1")}.items():
        drawn = planned(system=system)
        totals[name] = {phase: drawn.total(phase, sharded=False) for phase in PHASES}
        rows = rows_of(drawn)
        decoder = rows["transformer"].whole + rows["vae"].whole
        assert drawn.peak(False)[1] == max(totals[name].values())
    assert totals["away"]["render"] == totals["here"]["render"]
    assert totals["away"]["update"] == totals["here"]["update"] - decoder
    assert totals["other"]["update"] == totals["here"]["update"] - decoder
    assert totals["other"]["render"] < totals["here"]["render"] - decoder
    assert drawn.devices == [None, "cuda:1"]
    assert drawn.total("render", False, "cuda:1") > decoder == drawn.total("update", False, "cuda:1")


def test_keys_that_make_it_smaller_do():
    sizes = {}
    for parts in (1, 2, 4):
        sizes[parts] = rows_of(planned(mini_batches=parts))["activations"].whole
    assert sizes[1] == 2 * sizes[2] == 4 * sizes[4]
    recomputed = rows_of(planned(system=Planned(gradient_checkpointing=True), mini_batches=1))["activations"].whole
    assert recomputed < sizes[1]


def test_what_does_not_fit_is_one_line_with_the_largest_parts_and_keys():
    heavy = planned(sampling=Sampling(max_tokens=4000), group=8)
    phase, needed = heavy.peak()
    assert phase == "update"
    line = heavy.problem(needed - 1)
    assert "\n" not in line
    for words in (f"needs {needed / 2**30:.1f} GiB", "(phase update)", "activations", "encoder clip", "model.mini_batches"):
        assert words in line
    assert heavy.problem(needed) is None
    assert "It fits" in heavy.table(needed).splitlines()[-1]
    assert line in heavy.table(needed - 1).splitlines()[-1]


def test_the_table_is_aligned_and_adds_up():
    memory = planned()
    lines = memory.table().splitlines()
    (head,) = [line for line in lines if line.startswith("part ")]
    ends = [head.index(name) + len(name) for name in ("one GPU or DDP", "FSDP2 x 2")]
    numbers = [line for line in lines if line.startswith("phase ")]
    assert [line.split()[1] for line in numbers] == list(PHASES)
    for line in numbers:
        for end, sharded in zip(ends, (False, True), strict=True):
            assert line[:end].split()[-1] == f"{memory.total(line.split()[1], sharded) / 2**30:.1f}"
    assert sum("<- peak" in line for line in numbers) in (1, 2)
    assert not any(line != line.rstrip() for line in lines)


def test_processes_are_read_from_the_configuration(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert processes_of({"devices": 4, "num_nodes": 2}).count == 8
    assert processes_of({"devices": "0,1,2", "accelerator": "gpu"}).count == 3
    guess = processes_of({"devices": -1, "accelerator": "gpu"})
    assert (guess.count, guess.assumed) == (8, True)
    assert processes_of({"devices": "auto", "accelerator": "cpu"}).count == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    here = processes_of({"devices": "auto", "strategy": "fsdp2"})
    assert (here.count, here.assumed, here.sharded, here.ddp) == (2, False, True, False)
    assert processes_of({"strategy": "ddp"}).ddp


def test_a_system_without_a_blueprint_has_no_plan():
    with pytest.raises(ValueError, match="SimpleNamespace has no memory plan"):
        plan(SimpleNamespace(system=SimpleNamespace()), None, {})
    fast = planned(optimizer=partial(torch.optim.SGD, lr=1.0))
    assert rows_of(fast)["optimizer states"].whole == 0
