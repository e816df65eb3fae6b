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
ARRIVE, RESTORES, RESUMES = "training: gradients arrive", "reference: restores", "training: resumes"
JANUS = systems.Janus
FAULTS = {  # faults of parts that do not meet are looked at together: of captions, of pictures, and of training or the plan
    "ratio; size": (faulty(systems.OtherPolicy, systems.Narrow), {}, CAPTION_RATIO | {"pictures: size"}),
    "causality; range; plan": (
        faulty(systems.LooksAhead, systems.Bright, base=systems.PlannedTooSmall), {}, {CAUSALITY, "pictures: range", "plan: weights"}
    ),
    "padding; batch; reference": (
        faulty(systems.CountsPadding, systems.Averages, systems.careless), KL, {"captions: padding", "pictures: batch", RESTORES}
    ),
    "seeds; seeds; frozen": (
        faulty(systems.Deaf, systems.Unmoved, systems.forgotten), {},
        {OTHER, "pictures: other seeds", ARRIVE, "training: nothing else trains"},
    ),
    "banned; guidance": (
        faulty(systems.SaysBanned, systems.GuidesTwice, base=systems.Guided), {}, {"captions: banned tokens", "guidance: value"}
    ),
    "global generator; guidance of tokens": (
        faulty(systems.Global, systems.GuidesTokensTwice, base=JANUS), BOTH, {"captions: same seeds", RESUMES, "guidance: value"}
    ),
    "ratio of tokens; second pass": (
        faulty(None, systems.RunsTwice, base=JANUS), BOTH, PICTURE_RATIO | {"guidance: one pass at 1"}
    ),
    "order; causality of tokens": (
        faulty(systems.CountsRows, systems.TokensLookAhead, base=JANUS), BOTH,
        {"captions: padding", "captions: order of rows", "picture actions: causality"},
    ),
    "resume; batch of tokens": (
        faulty(systems.Remembers, systems.TokensCountRows, base=JANUS), BOTH, {RESUMES, "picture actions: batch"}
    ),
    "gradient of 0": (faulty(change=systems.detached), {}, {ARRIVE}),
    "no gradient; frozen bytes": (
        faulty(systems.Counts, change=systems.counting), {}, {ARRIVE, "training: frozen bytes"}
    ),
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


def test_faults_of_rewards_are_found_where_they_are(build):
    faults = {"identity": Worst(LayoutEncoder(cells=3)), "batch": Centred(), "frozen": Differentiable(), "range": Missing()}
    found = check(build(reward=WeightedReward(faults, dict.fromkeys(faults, 1.0))), data())
    assert red(found) == {f"reward {row}: {row}" for row in faults}


class Refuses(systems.HFCaptioner):
    def logprobs(self, rollout):
        raise ValueError("not\ntoday")


def test_an_error_is_a_row(build):
    found = check(build(system=faulty(Refuses)()), data())
    assert found["captions: padding"].verdict == "failed"
    assert found["captions: padding"].reason == "ValueError: not today"
    assert found["pictures: size"].verdict == "passed"
