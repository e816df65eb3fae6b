"""The loss, its gradient and its metrics against plain loops in float64, for every variant."""

from __future__ import annotations

import itertools
import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from uae.grpo import GRPOLoss

from . import reference

AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo")
IMPORTANCES = ("token", "sequence", "sequence_token")
METRICS = ("loss", "policy", "kl", "clip_fraction", "ratio_mean", "ratio_max")


def compare(case, epsilon_low=0.2, epsilon_high=0.2, normalizer=None, weighted=False, **settings_):
    """Assert that loss, gradient and metrics equal the loops' to 1e-9."""
    loss = GRPOLoss(epsilon_low, epsilon_high, **settings_)
    logp, old, advantage, mask, ref = case.tensors()
    weights, entropy = case.extras()
    terms = loss(
        logp, old, advantage, mask, ref if loss.beta else None, normalizer, weights if weighted else None,
        entropy if loss.needs_entropy else None,
    )  # fmt: skip
    terms.loss.backward()
    expected = reference.loss_and_gradient(
        case, eps_low=epsilon_low, eps_high=epsilon_high, normalizer=normalizer, weighted=weighted, **settings_
    )
    for name in METRICS:
        assert getattr(terms, name).item() == pytest.approx(expected[name], abs=1e-9), name
    assert_close(logp.grad, torch.tensor(expected["gradient"], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("aggregation", "importance", "beta_kl", "delta", "normalizer"),
    list(itertools.product(AGGREGATIONS, IMPORTANCES, [0, "k1", "k2", "k3"], [None, 1.35], [None, 61.5])),
)
def test_every_variant_matches_loops(aggregation, importance, beta_kl, delta, normalizer):
    for seed, (low, high) in enumerate([(0.2, 0.2), (0.1, 0.28), (0.3, 0.05), (0.0, 0.0)]):
        compare(
            reference.random_case(seed, empty_row=seed == 2),
            low,
            high,
            normalizer=normalizer,
            aggregation=aggregation,
            importance=importance,
            beta=0.07 if beta_kl else 0.0,
            kl=beta_kl or "k3",
            delta=delta,
            max_tokens=11 if aggregation == "dr_grpo" else None,
        )


@pytest.mark.parametrize(
    ("surrogate", "aggregation", "importance", "weighted"),
    list(itertools.product(["clip", "cispo", "sapo"], AGGREGATIONS, IMPORTANCES, [False, True])),
)
def test_surrogates_weights_and_entropies_match_loops(surrogate, aggregation, importance, weighted):
    for seed, (bonus, top, weighting) in enumerate(itertools.product([0.0, 0.3], [1.0, 0.4], ["none", "ratio"])):
        compare(
            reference.random_case(seed, empty_row=seed == 2),
            epsilon_high=0.28,
            normalizer=61.5 if seed % 2 else None,
            weighted=weighted,
            surrogate=surrogate,
            aggregation=aggregation,
            importance=importance,
            beta=0.07,
            kl=("k1", "k2", "k3")[seed % 3],
            kl_weighting=weighting,
            max_tokens=11,
            sapo_temperatures=(1.3, 2.1),
            entropy_bonus=bonus,
            top_entropy=top,
        )


def test_the_cases_exercise_every_branch():
    """The comparison above would be hollow if nothing were ever clipped, capped or ragged."""
    case = reference.random_case(0, rows=40)
    ratios = [
        (math.exp(lp - old), a)
        for row, olds, a, mask in zip(case.logp, case.old, case.advantages, case.mask, strict=True)
        for lp, old, m in zip(row, olds, mask, strict=True)
        if m
    ]
    for sign in (1, -1):
        for low, high in [(0, 0.8), (0.8, 1.2), (1.2, 1.35), (1.35, 9)]:
            assert sum(low < ratio < high and a * sign > 0 for ratio, a in ratios) >= 3


variants = st.fixed_dictionaries(
    {
        "aggregation": st.sampled_from(AGGREGATIONS),
        "importance": st.sampled_from(IMPORTANCES),
        "kl": st.sampled_from(["k1", "k2", "k3"]),
        "beta": st.sampled_from([0.0, 0.04]),
        "delta": st.sampled_from([None, 1.5]),
        "max_tokens": st.just(9),
        "epsilon_low": st.floats(0, 0.5),
        "epsilon_high": st.floats(0, 0.5),
    }
)
# The newer options beside those above; `delta` belongs to the surrogate "clip".
options = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {
            "delta": st.none(),
            "surrogate": st.sampled_from(["clip", "cispo", "sapo"]),
            "kl_weighting": st.sampled_from(["none", "ratio"]),
            "entropy_bonus": st.sampled_from([0.0, 0.2]),
            "top_entropy": st.sampled_from([1.0, 0.5]),
        }
    ),
)


@settings(max_examples=60, deadline=None)
@given(variants, options, st.integers(0, 10**6), st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e30]))
def test_masked_positions_change_nothing(variant, more, seed, junk):
    """Whatever stands where the mask is 0, the loss, the metrics and the gradient are bitwise the same."""
    case = reference.random_case(seed, rows=4, tokens=5, empty_row=True)
    results = []
    for filler in (0.0, junk):
        logp, old, advantage, mask, ref = case.tensors()
        hole = mask == 0
        advantage = advantage[:, None].expand_as(logp).masked_fill(hole, filler)
        logp = logp.detach().masked_fill(hole, filler).requires_grad_()
        weights, entropy = (values.masked_fill(hole, filler) for values in case.extras())
        terms = GRPOLoss(**variant | more)(
            logp, old.masked_fill(hole, filler), advantage, mask, ref.masked_fill(hole, filler), 30.0, weights, entropy
        )
        terms.loss.backward()
        assert (logp.grad[hole] == 0).all()
        results.append([logp.grad, *(getattr(terms, name).detach() for name in METRICS)])
    for clean, dirty in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)


@settings(max_examples=40, deadline=None)
@given(variants, options, st.integers(0, 10**6))
def test_rows_permute_and_padding_is_invisible(variant, more, seed):
    case = reference.random_case(seed, rows=5, tokens=4)
    logp, old, advantage, mask, ref = (tensor.detach() for tensor in case.tensors())
    weights, entropy = case.extras()
    loss = GRPOLoss(**variant | more)
    before = loss(logp, old, advantage, mask, ref, None, weights, entropy).loss
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    shuffled = [t[order] for t in (logp, old, advantage, mask, ref)], [t[order] for t in (weights, entropy)]
    assert_close(loss(*shuffled[0], None, *shuffled[1]).loss, before)
    for side in ((3, 0), (0, 3)):
        logp_, old_, mask_, ref_, *extras = (torch.nn.functional.pad(t, side) for t in (logp, old, mask, ref, weights, entropy))
        assert_close(loss(logp_, old_, advantage, mask_, ref_, None, *extras).loss, before)


@settings(max_examples=40, deadline=None)
@given(variants, st.integers(0, 10**6))
def test_the_clipped_objective_is_a_lower_bound(variant, seed):
    """Clipping is pessimistic: without a cap the policy loss is never below the unclipped one."""
    case = reference.random_case(seed)
    logp, old, advantage, mask, _ = case.tensors()
    clipped = GRPOLoss(**{**variant, "beta": 0.0, "delta": None})(logp, old, advantage, mask)
    free = GRPOLoss(**{**variant, "beta": 0.0, "delta": None, "epsilon_low": 1e9, "epsilon_high": 1e9})
    assert clipped.policy >= free(logp, old, advantage, mask).policy - 1e-12
    assert 0 <= clipped.clip_fraction <= 1
    assert clipped.ratio_max >= clipped.ratio_mean


def test_delta_bounds_the_loss_of_a_bad_sample_that_became_likely():
    logp = torch.tensor([[math.log(50.0)]], requires_grad=True)
    arguments = (torch.zeros(1, 1), torch.tensor([-1.0]), torch.ones(1, 1))
    assert GRPOLoss()(logp, *arguments).loss.item() == pytest.approx(50.0, rel=1e-5)
    terms = GRPOLoss(delta=4.0)(logp, *arguments)
    terms.loss.backward()
    assert terms.loss.item() == 4.0
    assert logp.grad.item() == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_nothing_to_learn_from_is_zero_not_nan(aggregation, importance):
    logp = torch.full((3, 4), math.nan, requires_grad=True)
    loss = GRPOLoss(aggregation=aggregation, importance=importance, beta=0.1, max_tokens=4)
    terms = loss(logp, logp.detach(), torch.full((3,), math.nan), torch.zeros(3, 4), logp.detach())
    terms.loss.backward()
    assert [getattr(terms, name).item() for name in METRICS] == [0] * 6
    assert (logp.grad == 0).all()


def test_advantage_shapes_and_mask_dtypes_agree():
    logp, old, advantage, mask, _ = reference.random_case(3).tensors()
    expected = GRPOLoss()(logp, old, advantage, mask).loss
    for shaped in (advantage[:, None], advantage[:, None].expand_as(logp)):
        assert torch.equal(GRPOLoss()(logp, old, shaped, mask).loss, expected)
    for dtype in (torch.bool, torch.int64, torch.bfloat16):
        assert torch.equal(GRPOLoss()(logp, old, advantage, mask.to(dtype)).loss, expected)


def test_only_logp_receives_gradient():
    tensors = [t.detach().requires_grad_() for t in reference.random_case(4).tensors()]
    logp, old, advantage, mask, ref = tensors
    GRPOLoss(beta=0.1)(logp, old, advantage, mask.detach(), ref).loss.backward()
    assert logp.grad is not None
    assert [t.grad for t in (old, advantage, ref)] == [None] * 3


def test_half_precision_is_computed_in_float32():
    logp, old, advantage, mask, ref = (t.detach().bfloat16() for t in reference.random_case(5).tensors())
    half = GRPOLoss(beta=0.1)(logp, old, advantage, mask, ref)
    full = GRPOLoss(beta=0.1)(logp.float(), old.float(), advantage.float(), mask.float(), ref.float())
    assert half.loss.dtype == torch.float32
    assert torch.equal(half.loss, full.loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon_low": -0.1}, r"loss\.epsilon_low=-0\.1; allowed: 0 or more"),
        ({"epsilon_high": math.nan}, r"loss\.epsilon_high=nan; allowed: 0 or more"),
        ({"beta": -1}, r"loss\.beta=-1"),
        ({"kl": "k4"}, "loss.kl='k4'; allowed: k1, k2, k3"),
        ({"aggregation": "mean"}, "loss.aggregation='mean'; allowed: grpo, bnpo, dr_grpo, dapo"),
        ({"importance": "row"}, "loss.importance='row'; allowed: token, sequence, sequence_token"),
        ({"surrogate": "ppo"}, "loss.surrogate='ppo'; allowed: clip, cispo, sapo"),
        ({"surrogate": "cispo", "delta": 3.0}, r"loss\.delta=3\.0 with surrogate=cispo; allowed: null"),
        ({"sapo_temperatures": (1.0, 0.0)}, r"loss\.sapo_temperatures=\[1\.0, 0\.0\]; allowed: two numbers above 0"),
        ({"kl_weighting": "sequence"}, "loss.kl_weighting='sequence'; allowed: none, ratio"),
        ({"entropy_bonus": -0.1}, r"loss\.entropy_bonus=-0\.1; allowed: 0 or more"),
        ({"top_entropy": 0.0}, r"loss\.top_entropy=0\.0; allowed: above 0 and at most 1"),
        ({"delta": 0.9}, r"loss\.delta=0\.9"),
        ({"max_tokens": 0}, "loss.max_tokens=0"),
        ({"aggregation": "dr_grpo"}, r"dr_grpo needs loss\.max_tokens"),
    ],
)
def test_bad_settings_are_one_line_errors(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        GRPOLoss(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logp": torch.zeros(2, 4)}, r"old_logp has shape \[2, 4\]; allowed: that of logp, \[2, 3\]"),
        ({"mask": torch.zeros(2)}, r"mask has shape \[2\]"),
        ({"ref_logp": torch.zeros(3, 2)}, r"ref_logp has shape \[3, 2\]"),
        ({"advantages": torch.zeros(1, 2)}, r"advantages have shape \[1, 2\]; allowed: \[2\], \[2, 1\] or \[2, 3\]"),
        ({"logp": torch.zeros(2)}, r"logp has shape \[2\]"),
        ({}, r"loss\.beta=0\.1 needs the reference's log-probs"),
        ({"weights": torch.zeros(2, 1)}, r"weights has shape \[2, 1\]"),
        ({"entropy": torch.zeros(3)}, r"entropy has shape \[3\]"),
    ],
)
def test_bad_inputs_are_one_line_errors(change, message):
    zeros = torch.zeros(2, 3)
    inputs = {"logp": zeros, "old_logp": zeros, "advantages": torch.zeros(2), "mask": zeros, **change}
    with pytest.raises(ValueError, match=message) as error:
        GRPOLoss(beta=0.1)(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", [{"entropy_bonus": 0.1}, {"top_entropy": 0.5}])
def test_entropies_that_are_needed_are_asked_for(setting):
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=rf"loss\.{next(iter(setting))} needs the entropies") as error:
        GRPOLoss(**setting)(zeros, zeros, torch.zeros(2), zeros)
    assert "\n" not in str(error.value)


def test_settings_come_from_yaml_and_are_frozen():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=GRPOLoss)
    given_ = ["--loss.aggregation=dr_grpo", "--loss.max_tokens=8", "--loss.delta=3", "--loss.kl=k1"]
    loss = parser.instantiate(parser.parse_args(given_)).loss
    assert loss == GRPOLoss(aggregation="dr_grpo", max_tokens=8, delta=3.0, kl="k1")
    with pytest.raises(FrozenInstanceError):
        loss.beta = 1.0


@pytest.mark.parametrize(("aggregation", "window"), [("grpo", "none"), ("dr_grpo", "none"), ("bnpo", "local"), ("dapo", "global")])
def test_a_loss_says_whose_window_it_divides_by(aggregation, window):
    loss = GRPOLoss(aggregation=aggregation, max_tokens=5)
    assert loss.window == window
    logp, old, advantage, mask, _ = reference.random_case(6).tensors()
    one, other = (loss(logp, old, advantage, mask, normalizer=count).loss for count in (50.0, 100.0))
    assert_close(other, one / 2)
    own = len(mask) if window == "none" else mask.sum()
    assert_close(loss(logp, old, advantage, mask, normalizer=own).loss, loss(logp, old, advantage, mask).loss)
