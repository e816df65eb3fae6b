import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from uae.models.conditioners.connectors import MetaQueryEncoder, OpenUniConnector, metaquery_connector

WIDTH, HEADS, LENGTH = 24, 3, 7
CLOSE = {"atol": 1e-10, "rtol": 0}


def randomised(module):
    """Every weight matters, biases and norms too; float64."""
    generator = torch.Generator().manual_seed(0)
    for weight in module.double().parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64) + (weight.ndim != 2)
    return module


@pytest.fixture
def states():
    return torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_openuni_is_torchs_own_encoder(states):
    connector = randomised(OpenUniConnector(WIDTH, 40, 2, HEADS))
    expected = states
    for layer in connector.layers:
        plain = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 40, 0.0, lambda x: F.gelu(x, approximate="tanh"), 1e-6, batch_first=True, norm_first=True
        )
        ours = layer.state_dict()
        state = {
            "self_attn.in_proj_" + kind: torch.cat([ours[f"self_attn.{name}_proj.{kind}"] for name in "qkv"])
            for kind in ("weight", "bias")
        }
        for kind in ("weight", "bias"):
            state[f"self_attn.out_proj.{kind}"] = ours[f"self_attn.out_proj.{kind}"]
            for n in (1, 2):
                state[f"linear{n}.{kind}"], state[f"norm{n}.{kind}"] = ours[f"mlp.fc{n}.{kind}"], ours[f"layer_norm{n}.{kind}"]
        plain.double().load_state_dict(state)
        expected = plain(expected)
    torch.testing.assert_close(connector(states), expected, **CLOSE)
    torch.testing.assert_close(connector(states.flip(1)).flip(1), connector(states), **CLOSE)  # no positions, no order


def plain_metaquery(layer, x):
    """One layer for one row ``[Q, D]``, written as loops; positions turn pairs of numbers, as complex ones."""

    def norm(row, gain, eps=1e-6):
        return row / (row.pow(2).mean() + eps).sqrt() * gain

    def linear(part, row):
        return part.weight @ row + (0 if part.bias is None else part.bias)

    def turned(head, position):
        half = len(head) // 2
        turn = [complex(math.cos(a), math.sin(a)) for a in (position * 10000 ** (-2 * i / len(head)) for i in range(half))]
        pairs = torch.complex(head[:half], head[half:]) * torch.tensor(turn, dtype=torch.complex128)
        return torch.cat([pairs.real, pairs.imag])

    def unit(vector, part, head):
        return part.gamma[head, 0] * math.sqrt(len(vector)) * vector / vector.norm()

    attention, mlp, size = layer.self_attn, layer.mlp, WIDTH // HEADS
    seen = [norm(row, layer.input_layernorm.weight) for row in x]
    heads = []
    for head in range(HEADS):
        at = slice(head * size, (head + 1) * size)
        query = [unit(turned(linear(attention.q_proj, row)[at], n), attention.q_norm, head) for n, row in enumerate(seen)]
        key = [unit(turned(linear(attention.k_proj, row)[at], n), attention.k_norm, head) for n, row in enumerate(seen)]
        value = torch.stack([linear(attention.v_proj, row)[at] for row in seen])
        weights = [torch.stack([q @ k / math.sqrt(size) for k in key]).softmax(0) for q in query]
        heads.append(torch.stack([weight @ value for weight in weights]))
    x = x + torch.cat(heads, dim=1) @ attention.o_proj.weight.T
    rows = [norm(row, layer.post_attention_layernorm.weight) for row in x]
    gates = [linear(mlp.gate_proj, row) for row in rows]
    inner = [g / (1 + (-g).exp()) * linear(mlp.up_proj, row) for g, row in zip(gates, rows, strict=True)]
    return x + torch.stack([linear(mlp.down_proj, row) for row in inner])


def test_metaquery_equals_loops(states):
    connector = randomised(metaquery_connector(WIDTH, 10, layers=2, heads=HEADS))
    encoder, first, _, second, last = connector
    for row, result in zip(states, connector(states), strict=True):
        for layer in encoder.layers:
            row = plain_metaquery(layer, row)
        inner = row @ first.weight.T + first.bias
        inner = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        out = inner @ second.weight.T + second.bias
        expected = out / (out.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * last.weight
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)  # positions are turned in float32


def test_the_names_are_the_published_ones():
    layer = [f"self_attn.{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")]
    layer += [f"{part}.{kind}" for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")]
    assert set(OpenUniConnector(64, 8, 2).state_dict()) == {f"layers.{n}.{name}" for n in range(2) for name in layer}
    layer = [f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")] + ["self_attn.o_proj.weight"]
    layer += [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")] + [f"self_attn.{p}_norm.gamma" for p in "qk"]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names = {f"0.layers.{n}.{name}" for n in range(2) for name in layer}
    names |= {"1.weight", "1.bias", "3.weight", "3.bias", "4.weight"}
    assert set(metaquery_connector(64, 8, layers=2).state_dict()) == names


def test_training_starts_where_the_published_ones_start():
    torch.manual_seed(0)
    encoder, *_, norm = metaquery_connector(128, 16, layers=1)
    assert torch.equal(norm.weight, torch.full((16,), math.sqrt(5.5)))
    layer = encoder.layers[0]
    for name, weight in layer.named_parameters():
        if weight.ndim == 2:
            assert 0.013 < weight.std() < 0.015, name
        else:
            assert weight.unique().tolist() == ([0] if "bias" in name else [1]), name
    layer = OpenUniConnector(128, 64, 1).layers[0]
    for linear in (layer.self_attn.q_proj, layer.self_attn.out_proj, layer.mlp.fc1, layer.mlp.fc2):
        bound = math.sqrt(6 / sum(linear.weight.shape))  # Glorot's uniform
        assert 0.98 * bound < linear.weight.abs().max() <= bound
        assert linear.bias.abs().max() < 1e-5


def test_heads_must_divide_the_width():
    assert OpenUniConnector(128, 8, 1).layers[0].self_attn.heads == 2  # of 64
    for create in (lambda: OpenUniConnector(128, 8, 1, 3), lambda: MetaQueryEncoder(128, 1, 3)):
        with pytest.raises(ValueError, match="width 128 does not split into 3 heads"):
            create()
