"""Logits of the output layer against float64, in batches of any size, and with every kind of weight."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from torch.testing import assert_close

from uae.grpo import LogitRule, OutputLayer, selected_logprobs
from uae.grpo import output_layer as module

SIZES = [(300, 64), (8192, 256), (9001, 1536), (4001, 2048)]  # V and D; the first one is small, the last two have several pieces


def problem(V: int, D: int, dtype: torch.dtype = torch.float32, C: int = 33):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(C, D, generator=generator).to(dtype), (torch.randn(V, D, generator=generator) / D**0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_logits_are_those_of_float64_on_the_same_numbers(size, dtype):
    """With banned tokens, a bias, a temperature, a scale and a cap; the surrounding autocast rounds nothing."""
    hidden, weight = problem(*size, dtype)
    bias, banned, rule = weight[:, 0].clone(), torch.tensor([2, size[0] - 1]), LogitRule(0.9, 3.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = OutputLayer(weight, 0.7, banned, bias, rule)(hidden)
    expected = 3 * torch.tanh(0.9 * (hidden.double() @ weight.double().t() + bias.double()) / 3) / 0.7
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(got.double(), expected.index_fill(1, banned, -torch.inf), atol=1e-12 if dtype == torch.float64 else 1e-5, rtol=0)


OLDER = not module.reorders(torch.empty(module.SMALL, 1)) or Version(torch.__version__) < Version("2.14")


@pytest.mark.skipif(OLDER, reason="torch has no oneDNN here, or one whose products of few rows add in another order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES[1:])
def test_a_rows_logits_do_not_depend_on_its_batch(size, dtype):
    """Bit for bit, for a row alone, too, and wherever the weight lies in memory."""
    hidden, weight = problem(*size, dtype, C=256)
    all_CV, shifted = OutputLayer(weight)(hidden), torch.cat([weight.new_zeros(3), weight.flatten()])[3:].view_as(weight)
    for rows in ([0], [20], [3, 4], [9, 1, 7], range(8), range(5, 30), range(100, 255)):
        for keep in (False, True):
            assert torch.equal(OutputLayer(shifted, keep=keep)(hidden[list(rows)]), all_CV[list(rows)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_float64_on_the_same_numbers(dtype):
    """A 16-bit weight is read in pieces; the surrounding autocast rounds nothing."""
    slope, weight = problem(33, 9001)[1] * 9001**0.5, problem(9001, 1536, dtype)[1]
    with torch.autocast("cpu", torch.bfloat16):
        got = OutputLayer(weight, keep=False).gradient(slope)
    assert_close(got.double(), slope.double() @ weight.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("keep", [False, True])
def test_a_weight_may_lie_in_memory_in_any_order(keep):
    hidden, weight = problem(8192, 256)
    turned = weight.t().contiguous().t()
    assert_close(OutputLayer(turned, keep=keep)(hidden), hidden @ weight.t(), atol=1e-5, rtol=0)
    assert_close(OutputLayer(weight[::2], keep=keep)(hidden), hidden @ weight[::2].t(), atol=1e-5, rtol=0)


def test_no_rows():
    assert OutputLayer(problem(8192, 256)[1])(torch.empty(0, 256)).shape == (0, 8192)


def test_a_log_prob_is_that_of_the_weight_at_the_time():
    """A weight that changes in place, in whatever way, is read anew by the next call."""
    hidden, weight = problem(8192, 256)
    ids, before = torch.arange(33), selected_logprobs(hidden, weight, torch.arange(33))
    weight.data.view(-1).untyped_storage().copy_((2 * weight).untyped_storage())
    after = selected_logprobs(hidden, weight, ids)
    assert_close(after, (hidden @ weight.t()).log_softmax(-1)[ids, ids], atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 0.1


def test_without_onednn_the_logits_are_the_same_but_for_rounding(monkeypatch):
    hidden, weight = problem(8192, 256)
    with_it = OutputLayer(weight)(hidden)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert_close(OutputLayer(weight)(hidden), with_it, atol=1e-5, rtol=0)
