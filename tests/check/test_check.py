"""A sound system passes every check, and a system with one fault fails in exactly the row that is about it."""

import pytest
import torch

from tests.check import systems
from tests.check.systems import faulty
from tests.conftest import Letters, data
from uae.check import check
from uae.encoders import LayoutEncoder
from uae.grpo import GRPOLoss
from uae.models.finetune import LoRA
from uae.rewards import BaseReward, EncoderSimilarity, WeightedReward

BOTH = {"train": "both", "finetune": LoRA(rank=2)}
KL = {"loss": GRPOLoss(beta=0.1)}


def verdicts(found):
    return {name: one.verdict for name, one in found.items()}


def red(found):
    return {name for name, one in found.items() if one.verdict == "failed"}


@pytest.mark.parametrize(
    ("kind", "changes", "skipped"),
    [
        (systems.Planned, KL, {"guidance: value", "picture actions: ratio", "reward letters: identity"}),
        (systems.Guided, {"finetune": LoRA(rank=2)}, {"picture actions: ratio", "plan: weights", "reward letters: identity"}),
        (systems.Janus, BOTH, {"plan: weights", "reward letters: identity"}),
    ],
)
def test_a_sound_system_passes(build, kind, changes, skipped):
    shown = []
    found = check(build(system=kind(), **changes), data(), show=lambda name, one: shown.append((name, one)))
    assert not red(found), {name: found[name] for name in red(found)}
    assert {name for name, one in found.items() if one.verdict == "not applicable"} == skipped
    assert shown == [pair for name, one in found.items() for pair in ((name, None), (name, one))]


CAPTION_RATIO = {"captions: ratio, float32", "captions: ratio, 16 bits"}
PICTURE_RATIO = {"picture actions: ratio, float32", "picture actions: ratio, 16 bits"}
CAUSALITY, OTHER = "captions: causality", "captions: other seeds"
JANUS = systems.Janus
FAULTS = {  # a fault of captions and one of pictures are looked at together where they are of different parts
    "ratio; size": (faulty(systems.OtherPolicy, systems.Narrow), {}, CAPTION_RATIO | {"pictures: size"}),
    "causality; range": (faulty(systems.LooksAhead, systems.Bright), {}, {CAUSALITY, "pictures: range"}),
    "padding; batch": (faulty(systems.CountsPadding, systems.Averages), {}, {"captions: padding", "pictures: batch"}),
    "order": (faulty(systems.CountsRows), {}, {"captions: padding", "captions: order of rows"}),
    "seeds; seeds": (faulty(systems.Deaf, systems.Unmoved), {}, {OTHER, "pictures: other seeds"}),
    "global generator": (faulty(systems.Global), {}, {"captions: same seeds", "training: resumes"}),
    "banned; guidance": (
        faulty(systems.SaysBanned, systems.GuidesTwice, base=systems.Guided), {}, {"captions: banned tokens", "guidance: value"}
    ),
    "guidance of tokens": (faulty(None, systems.GuidesTokensTwice, base=JANUS), BOTH, {"guidance: value"}),
    "ratio of tokens; second pass": (
        faulty(None, systems.RunsTwice, base=JANUS), BOTH, PICTURE_RATIO | {"guidance: one pass at 1"}
    ),
    "causality of tokens": (faulty(None, systems.TokensLookAhead, base=JANUS), BOTH, {"picture actions: causality"}),
    "batch of tokens": (faulty(None, systems.TokensCountRows, base=JANUS), BOTH, {"picture actions: batch"}),
    "gradient of 0": (faulty(change=systems.detached), {}, {"training: gradients arrive"}),
    "no gradient; frozen bytes": (
        faulty(systems.Counts, change=systems.counting), {}, {"training: gradients arrive", "training: frozen bytes"}
    ),
    "frozen": (faulty(change=systems.forgotten), {}, {"training: gradients arrive", "training: nothing else trains"}),
    "reference": (faulty(change=systems.careless), KL, {"reference: restores"}),
    "resume": (faulty(systems.Remembers), {}, {"training: resumes"}),
    "plan": (systems.PlannedTooSmall, {}, {"plan: weights"}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_where_it_is(build, fault):
    system, changes, expected = FAULTS[fault]
    found = check(build(system=system(), **changes), data())
    assert red(found) == expected, {name: found[name] for name in red(found) ^ expected}
    assert all(found[name].reason for name in expected)


class Worst(EncoderSimilarity):
    """The less an image resembles its source, the better."""

    def __call__(self, *args):
        return -super().__call__(*args)


class Centred(Letters):
    """Relative to the rows of the call."""

    def __call__(self, *args):
        reward_BG = super().__call__(*args)
        return reward_BG - reward_BG.mean()


class Differentiable(BaseReward):
    def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
        return reconstructions_NCHW.mean((1, 2, 3)).view(len(sources_BCHW), -1)


class Missing(BaseReward):
    def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
        return torch.full((len(sources_BCHW), len(texts) // len(sources_BCHW)), torch.nan)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Worst(LayoutEncoder(cells=3)), {"identity"}),
        (Centred(), {"batch"}),
        (Differentiable(), {"frozen"}),
        (Missing(), {"range"}),
    ],
)
def test_a_fault_of_a_reward_is_found_where_it_is(build, part, expected):
    found = check(build(reward=WeightedReward({"one": part}, {"one": 1.0})), data())
    assert red(found) == {f"reward one: {row}" for row in expected}


class Refuses(systems.HFCaptioner):
    def logprobs(self, rollout):
        raise ValueError("not\ntoday")


def test_an_error_is_a_row(build):
    found = check(build(system=faulty(Refuses)()), data())
    assert found["captions: padding"].verdict == "failed"
    assert found["captions: padding"].reason == "ValueError: not today"
    assert found["pictures: size"].verdict == "passed"
