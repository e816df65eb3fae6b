"""The table of parts counts every weight once, and says what trains."""

import pytest
import torch

from tests.tiny_random import RandomTiny
from uae.console.parts import parts_of, table
from uae.encoders import LayoutEncoder
from uae.metrics import UnifiedScore
from uae.miniature.tiny import Tiny, TinyCLIP, TinyJudge
from uae.miniature.tiny_janus import TinyJanus
from uae.models.finetune import LoRA
from uae.rewards import EncoderSimilarity, WeightedReward


@pytest.fixture(scope="module")
def parts():
    umm = Tiny().build()
    LoRA(rank=4).attach(umm.captioner.learner, keep_reference=False)
    clip = TinyCLIP()
    reward = WeightedReward({"clip": EncoderSimilarity(clip)}, {"clip": 1.0}).load()
    score = UnifiedScore({"clip": TinyCLIP(), "judge": TinyJudge(), "layout": LayoutEncoder()}, held_out=["judge"])
    score.load()
    return umm, {part.name: part for part in parts_of(umm, reward, score)}


def test_every_weight_counts_once(parts):
    umm, parts = parts
    network = umm.captioner.learner.network
    of_adapter = sum(p.numel() for name, p in network.named_parameters() if "lora_" in name)
    whole = sum(p.numel() for p in network.parameters())
    assert parts["captioner"].parameters == whole - of_adapter
    assert parts["captioner"].trains == 0
    assert parts["  its adapter"].parameters == parts["  its adapter"].trains == of_adapter > 0
    assert parts["decoder"].parameters == sum(p.numel() for module in umm.renderer.modules() for p in module.parameters())
    assert (parts["decoder"].trains, parts["decoder"].dtype, parts["decoder"].device) == (0, "float32", "cpu")
    assert parts["reward: clip"].parameters > 0
    assert parts["metric: clip"].parameters == 0  # the same weights as the reward's
    assert parts["metric: judge"].parameters > 0
    assert parts["metric: layout"].networks == "no network"


def test_networks_are_named_by_their_own_class(parts):
    _, parts = parts
    assert parts["captioner"].networks == "Qwen2_5_VLForConditionalGeneration"
    assert "SD3Transformer2DModel" in parts["decoder"].networks


def test_one_network_that_captions_and_draws_is_counted_once():
    captioner, *others = parts_of(TinyJanus().build())
    assert captioner.parameters > 0
    shared = {part.name: part for part in others}["decoder"]
    assert "(counted above)" in shared.networks or shared.parameters < captioner.parameters


def test_types_are_told_apart():
    umm = RandomTiny(spread=0.025).build()
    for module in umm.renderer.modules():
        module.to(torch.bfloat16)
    found = {part.name: part for part in parts_of(umm)}
    assert (found["captioner"].dtype, found["decoder"].dtype) == ("float32", "bfloat16")


def test_the_table_has_aligned_columns(parts):
    _, parts = parts
    head, *rows = table(list(parts.values())).splitlines()
    assert len(rows) == len(parts)
    assert len({row.index("float32") for row in rows if "float32" in row}) == 1
    end = head.index("parameters") + len("parameters")
    assert rows[0][:end].endswith(f"{parts['captioner'].parameters:,}")
