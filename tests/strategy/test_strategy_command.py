"""The command line under FSDP2, under DDP and in one process with twice the batch: one run, whatever divides it.

Every run is ``fit --config configs/tiny.yaml`` with pixels in, made small by ``tests/equivalence.yaml``. What the sharded ones
send is compared with what the plan says they send.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.collectives import Collectives
from tests.recorder import Recorder
from tests.two_processes import run_on
from uae.memory.communication import communication
from uae.memory.processes import processes_of

ROOT = Path(__file__).parents[2]
FILES = (ROOT / "configs/tiny.yaml", ROOT / "tests/equivalence.yaml")
CLIP = 0.05
SCENARIOS = [("lora", 1), ("lora", 2), ("full", 2)]  # what trains, batches per optimizer step
LOW = [("lora", 2), ("full", 1)]
FSDP2 = "--trainer.strategy=uae.strategy.FSDP2Strategy"
COPIES = [FSDP2, "--trainer.strategy.shard_size=1"]
BFLOAT16 = ["--trainer.strategy.param_dtype=bfloat16", "--model.init_args.ratio_tolerance=0.2"]
ONE = {"float32": (["--trainer.strategy=auto"], SCENARIOS), "bfloat16": ([FSDP2, *BFLOAT16], LOW)}
TWO = {
    "ddp": (["--trainer.strategy=ddp"], SCENARIOS),
    "fsdp2": (["--trainer.strategy=fsdp2"], SCENARIOS),
    "copies": (COPIES, SCENARIOS[1:2]),
    "bfloat16": ([FSDP2, *BFLOAT16], LOW),
    "bfloat16 copies": ([*COPIES, *BFLOAT16], LOW),
}
SHARDED = [(kind, scenario) for kind, (_, scenarios) in TWO.items() for scenario in scenarios if kind != "ddp"]
BY_KIND = {"all-gather": "_allgather_base_", "reduce-scatter": "_reduce_scatter_base_", "all-reduce": "allreduce_"}
BLOCKS, ROOT_MODULE = {"text": 2, "image": 2}, 1
STOP = 4  # bytes of Lightning's vote whether to stop


def command(finetune, accumulate, options):
    words = [str(word) for file in (*FILES, ROOT / f"configs/finetune/{finetune}.yaml") for word in ("--config", file)]
    words += [f"--trainer.accumulate_grad_batches={accumulate}", f"--model.init_args.mini_batches={accumulate}"]
    if finetune == "lora":
        words.append("--model.init_args.finetune.init_args.rank=3")  # three rows do not divide by two
    clip = [f"--trainer.gradient_clip_val={CLIP}"] if accumulate > 1 else ["--trainer.gradient_clip_val=null"]
    once = "--check_first_rollout=false"  # it sends something once, and what is counted is sent in every step
    return ["fit", *words, *clip, once, "--model.init_args.optimizer.lr=0.05", *options]


def run(finetune, accumulate, options):
    """Losses, norms and weights; what rollouts sent; what was sent per optimizer step, and what the plan says."""
    from uae.cli import main

    with Collectives() as sent:
        cli = main(command(finetune, accumulate, options))
    (recorder,) = (one for one in cli.trainer.callbacks if isinstance(one, Recorder))
    model, settings = cli.model, {**cli.config.fit.trainer.as_dict(), "strategy": cli.trainer.strategy}
    policy, copy = [*model.umm.captioner.learner.roots(), None][:2]
    exchanges = communication(policy, copy, processes_of(settings), model.plan.mini_batches, 2 * accumulate)
    steps = cli.trainer.global_step
    planned = {kind: sum(e.whole * e.times for e in exchanges if e.kind == kind) for kind in BY_KIND}
    counted = {kind: sent.bytes[name] / steps for kind, name in BY_KIND.items()}
    return {**recorder.result, "rollouts": recorder.rollouts, "planned": planned, "counted": counted}


def run_kinds(rank, folder, kinds, options):
    os.chdir(folder)
    return {
        (kind, scenario): run(*scenario, [*chosen, *options]) for kind, (chosen, scenarios) in kinds.items() for scenario in scenarios
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Runs of one process, by kind and scenario."""
    return run_on(1, run_kinds, str(tmp_path_factory.mktemp("one")), ONE, ["--trainer.devices=1"], timeout=300)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs of two processes, each with half the batch."""
    options = ["--trainer.devices=2", "--data.init_args.batch_size=2"]
    first, second = run_on(2, run_kinds, str(tmp_path_factory.mktemp("two")), TWO, options, timeout=300)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    return first


def trained(result):
    return {key: result[key] for key in ("losses", "norms", "weights")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scenario"), [(kind, scenario) for kind in ("ddp", "fsdp2", "copies") for scenario in TWO[kind][1]], ids=str
)
def test_two_processes_train_as_one_with_twice_the_batch(one, two, kind, scenario):
    alone, divided = trained(one["float32", scenario]), trained(two[kind, scenario])
    assert len(alone["losses"]) == len(alone["norms"]) == 4
    assert max(map(abs, alone["losses"])) > 1e-3  # off-policy and with a KL, or the losses would be zero
    assert scenario[1] == 1 or min(alone["norms"]) > CLIP  # every step is clipped
    torch.testing.assert_close(divided, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", LOW, ids=str)
def test_in_bfloat16_dividing_the_weights_changes_nothing(two, scenario):
    divided, whole = trained(two["bfloat16", scenario]), trained(two["bfloat16 copies", scenario])
    torch.testing.assert_close(divided, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", LOW, ids=str)
def test_in_bfloat16_two_processes_train_as_one_within_rounding(one, two, scenario):
    """Products of other shapes round otherwise: a value in bfloat16 has a relative error of up to 2^-8."""
    alone, divided = one["bfloat16", scenario], two["bfloat16", scenario]
    torch.testing.assert_close(divided["losses"], alone["losses"], rtol=0, atol=1e-3)
    torch.testing.assert_close(divided["norms"], alone["norms"], rtol=0.04, atol=0)
    moved = max(abs(a - b) for a, b in zip(alone["losses"], divided["losses"], strict=True))
    assert moved > 0  # it is bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scenario"), SHARDED, ids=str)
def test_a_rollout_gathers_every_module_once_however_many_tokens(two, kind, scenario):
    """And the frozen copy of full finetuning, sharded as well, once per mini-batch: its text blocks twice, its image tower never."""
    finetune, mini_batches = scenario
    copy = mini_batches * (ROOT_MODULE + 2 * BLOCKS["text"]) if finetune == "full" else 0
    gathers = 0 if "copies" in kind else ROOT_MODULE + sum(BLOCKS.values()) + copy
    rollouts = two[kind, scenario]["rollouts"]
    assert len(rollouts) == 2
    assert [sent.get("_allgather_base_", 0) for sent in rollouts] == [gathers] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scenario"), [*SHARDED, *(("ddp", scenario) for scenario in SCENARIOS)], ids=str)
def test_the_plan_knows_every_byte_that_is_sent(two, kind, scenario):
    result = two[kind, scenario]
    assert sum(result["planned"].values()) > 50_000
    assert result["counted"] == {**result["planned"], "all-reduce": result["planned"]["all-reduce"] + STOP}


def test_a_shard_size_that_does_not_divide_is_one_line(monkeypatch, capsys, tmp_path):
    from uae.cli import main

    monkeypatch.chdir(tmp_path)
    for size in (2, 0):
        with pytest.raises(SystemExit, match="2"):
            main(command("lora", 1, [FSDP2, f"--trainer.strategy.shard_size={size}", "--trainer.devices=1"]))
        last = capsys.readouterr().err.strip().splitlines()[-1]
        key = "trainer.strategy.init_args.shard_size"
        assert last == f"error: {key}={size} with 1 processes; allowed: 1, or null for all; change {key}"
