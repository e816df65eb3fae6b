import doctest
import pickle
from copy import deepcopy

import jsonargparse
import lightning
import numpy as np
import pytest
import torch

from tests.encoders import folders
from uae.cli.command import Parser
from uae.encoders import HFEncoder, LayoutEncoder
from uae.metrics import UnifiedScore, similarity, unified_score
from uae.rewards import EncoderSimilarity

torch.set_num_threads(1)


def pairs(count=11, size=16, seed=0):
    """Sources and noisy reconstructions of varying quality, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.rand(count, 3, size, size, generator=generator)
    noise = torch.rand(count, 3, size, size, generator=generator)
    keep = torch.linspace(0.2, 0.9, count).view(-1, 1, 1, 1)
    return keep * sources + (1 - keep) * noise, sources


def layouts(**kwargs):
    return UnifiedScore({"coarse": LayoutEncoder(2), "fine": LayoutEncoder(8)}, held_out=("fine",), **kwargs)


def cosine(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    return [x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)]


def test_equals_a_plain_recomputation_on_clip_and_dinov2(tmp_path):
    encoders = {
        "clip": HFEncoder(folders.clip(tmp_path / "clip")),
        "dinov2": HFEncoder(folders.dinov2(tmp_path / "dinov2"), "cls"),
        "layout": LayoutEncoder(4),
    }
    reconstructions, sources = pairs(9, size=33)
    metric = UnifiedScore(encoders, held_out=("dinov2", "layout"), bootstrap=200, seed=4)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 9)):
        metric.update(reconstructions[rows], sources[rows])
    result = metric.compute()

    with torch.no_grad():
        table = {name: cosine(e.embed(reconstructions), e.embed(sources)) for name, e in encoders.items()}
        neighbours = [3, 0, 1, 2, 7, 4, 5, 6]  # one batch back, first to last; the batch of one has no neighbour
        floors = [cosine(e.embed(reconstructions[:8]), e.embed(sources[neighbours])) for e in encoders.values()]
    means = {name: np.mean(values) for name, values in table.items()}
    unified, floor = np.mean(list(means.values())), np.mean(floors)
    expected = {
        **means,
        "unified": unified,
        "held_out": (means["dinov2"] + means["layout"]) / 2,
        "floor": floor,
        "calibrated": (unified - floor) / (1 - floor),
        "n": 9,
        "n_invalid": 0,
    }
    interval = {key: result.pop(key) for key in ("ci95", "ci95_low", "ci95_high")}
    assert result == pytest.approx(expected, abs=1e-6)
    assert interval["ci95_low"] < unified < interval["ci95_high"]
    assert interval["ci95"] == pytest.approx((interval["ci95_high"] - interval["ci95_low"]) / 2)


def test_interval_is_the_normal_one_for_many_images():
    reconstructions, sources = pairs(400)
    metric = layouts(bootstrap=2000)
    metric.update(reconstructions, sources)
    rows = np.mean([cosine(e.embed(reconstructions), e.embed(sources)) for e in metric.encoders.values()], axis=0)
    assert metric.compute()["ci95"] == pytest.approx(1.96 * rows.std(ddof=1) / 20, rel=0.1)
    without = layouts(bootstrap=0)
    without.update(reconstructions[:3], sources[:3])
    assert not {"ci95", "ci95_low", "ci95_high"} & set(without.compute())


def test_batches_and_order_change_nothing():
    reconstructions, sources = pairs()
    ids = torch.arange(11) * 2**29 + 3  # beyond what one float32 can hold
    whole, split = layouts(), layouts()
    whole.update(reconstructions, sources, ids)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    for rows in order.split(4):
        split.update(reconstructions[rows], sources[rows], ids[rows].tolist())
    a, b = whole.compute(), split.compute()
    for key in ("floor", "calibrated"):  # neighbours differ, by design
        a.pop(key), b.pop(key)
    assert a == b


def test_identity_is_one_and_shuffled_pairs_score_the_floor():
    reconstructions, sources = pairs(200)
    metric = layouts()
    metric.update(sources, sources)
    result = metric.compute()
    assert all(abs(result[key] - 1) < 1e-6 for key in ("unified", "coarse", "fine", "held_out", "calibrated"))

    matched, shuffled = layouts(), layouts()
    matched.update(reconstructions, sources)
    shuffled.update(reconstructions.roll(77, 0), sources)
    standard_error = shuffled.compute()["ci95"] / 1.96
    assert abs(shuffled.compute()["unified"] - matched.compute()["floor"]) < 4 * standard_error
    assert abs(shuffled.compute()["calibrated"]) < 0.05 < matched.compute()["calibrated"]


def test_duplicates_count_once_and_never_serve_as_mismatched_pairs():
    reconstructions, sources = pairs(4)
    plain, padded = layouts(), layouts()
    plain.update(reconstructions, sources, [10, 11, 12, 13])
    padded.update(reconstructions, sources, [10, 11, 12, 13])
    padded.update(reconstructions[:1], sources[:1], [10])
    padded.update(reconstructions[[1, 1]], sources[[1, 1]], [11, 11])
    assert padded.compute() == plain.compute()

    anonymous = layouts()
    anonymous.update(reconstructions[[1, 1]], sources[[1, 1]])
    assert anonymous.compute()["n"] == 2

    only_one = layouts()
    only_one.update(reconstructions[[1, 1]], sources[[1, 1]], [11, 11])
    assert only_one.compute()["n"] == 1
    assert not {"floor", "calibrated"} & set(only_one.compute())


def test_broken_images_score_zero_and_are_counted():
    reconstructions, sources = pairs(5)
    metric = layouts()
    metric.update(reconstructions, sources)
    clean = metric.compute()
    metric.reset()
    broken = reconstructions.clone()
    broken[2, 1, 4, 4] = torch.nan
    metric.update(broken, sources)
    result = metric.compute()
    lost = cosine(LayoutEncoder(8).embed(reconstructions[2:3]), LayoutEncoder(8).embed(sources[2:3]))[0]
    assert result["fine"] == pytest.approx(clean["fine"] - lost / 5, abs=1e-6)
    assert (result["n"], result["n_invalid"], clean["n_invalid"]) == (5, 1, 0)
    others = [0, 1, 3, 4]  # the broken reconstruction leaves the mismatched pairs as well
    floors = [cosine(e.embed(reconstructions), e.embed(sources.roll(1, 0))) for e in metric.encoders.values()]
    assert result["floor"] == pytest.approx(np.mean(floors, axis=0)[others].mean(), abs=1e-6)


def test_refuses_what_would_silently_be_wrong():
    reconstructions, sources = pairs(3)
    metric = layouts()
    with pytest.raises(ValueError, match="saw no image"), pytest.warns(UserWarning, match="before"):
        metric.compute()
    with pytest.raises(ValueError, match="reconstructions must be float in"):
        metric.update(reconstructions * 2 - 1, sources)
    with pytest.raises(ValueError, match="sources must be float in"):
        metric.update(reconstructions, (sources * 255).to(torch.uint8))
    with pytest.raises(ValueError, match="got 3 reconstructions, 2 sources, no ids"):
        metric.update(reconstructions, sources[:2])
    for ids in ([-1, 0, 1], [0, 1, 2**48], [0.5, 1.0, 2.0]):
        with pytest.raises(ValueError, match="whole numbers"):
            metric.update(reconstructions, sources, ids)
    for encoders, held_out in (({}, ()), ({"a": LayoutEncoder()}, ("b",)), ({"floor": LayoutEncoder()}, ())):
        with pytest.raises(ValueError, match="init_args.encoders"):
            UnifiedScore(encoders, held_out)


class Holder(lightning.LightningModule):
    def __init__(self, metric):
        super().__init__()
        self.policy = torch.nn.Linear(2, 2)
        self.unified_score = metric


def test_encoders_stay_out_of_checkpoints_copies_and_casts(tmp_path):
    encoder = HFEncoder(folders.clip(tmp_path / "clip"))
    module = Holder(UnifiedScore({"clip": encoder}).load())
    reconstructions, sources = pairs(4, size=28)
    module.unified_score.update(reconstructions, sources)
    expected = module.unified_score.compute()

    names = {"policy.weight", "policy.bias"}
    assert set(module.state_dict()) == names == {name for name, _ in module.named_parameters()}
    module.load_state_dict(Holder(layouts()).state_dict(), strict=True)
    assert len(pickle.dumps(module.unified_score)) < 20_000
    tower = encoder._loaded.module
    for copied in (
        deepcopy(module).unified_score,
        pickle.loads(pickle.dumps(module.unified_score)),
        module.unified_score.clone(),
    ):
        assert copied.encoders["clip"] is not encoder
        copied.reset()
        copied.update(reconstructions, sources)
        assert copied.compute() == expected
        assert copied.encoders["clip"]._loaded.module is tower

    module.to(torch.bfloat16).train().requires_grad_(True)
    assert not tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    module.unified_score.reset()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        module.unified_score.update(reconstructions, sources)
    assert module.unified_score.compute() == pytest.approx(expected, abs=1e-6)


def test_a_reward_and_a_metric_look_through_one_tower(tmp_path):
    path = folders.clip(tmp_path / "clip")
    reward = EncoderSimilarity(HFEncoder(path)).load()
    metric = UnifiedScore({"clip": HFEncoder(path)}, bootstrap=0).load()
    assert metric.encoders["clip"]._loaded is reward.encoder._loaded
    reconstructions, sources = pairs(4, size=28)
    metric.update(reconstructions, sources)
    expected = reward(sources, reconstructions, [""] * 4).mean().item()
    assert metric.compute()["clip"] == pytest.approx(expected, abs=1e-6)


def test_scores_are_those_of_full_precision_whatever_surrounds_them(tmp_path):
    """Images of a bf16 module are its own affair; the encoder is not touched by it."""
    metric = UnifiedScore({"clip": HFEncoder(folders.clip(tmp_path / "clip"))}, bootstrap=0)
    reconstructions, sources = (images.bfloat16() for images in pairs(4, size=28))
    metric.update(reconstructions.float(), sources.float())
    expected = metric.compute()
    holder = Holder(metric).to(torch.bfloat16).train()
    metric.reset()
    with torch.autocast("cpu", torch.bfloat16):
        holder.unified_score.update(reconstructions, sources)
    assert metric.compute() == pytest.approx(expected, abs=1e-6)
    assert metric.cosine_0[0].dtype == torch.float32


def test_configurable_from_yaml():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--score", type=UnifiedScore)
    encoders = {"layout": {"class_path": "uae.encoders.LayoutEncoder", "init_args": {"cells": 3}}}
    config = parser.parse_object({"score": {"encoders": encoders, "held_out": ["layout"]}})
    metric = parser.instantiate(config).score
    assert metric.encoders["layout"].cells == 3
    assert metric.held_out == ("layout",)


def test_the_example_of_the_documentation_runs():
    result = doctest.testmod(unified_score)
    assert result.attempted > 5
    assert result.failed == 0


def test_the_pure_function_is_what_the_metric_computes():
    reconstructions, sources = pairs(7)
    metric = layouts(bootstrap=50, seed=3)
    metric.update(reconstructions, sources, range(7))  # images are drawn again in the order of their ids
    matched_EN, mismatched_EN = unified_score.matched_and_mismatched(metric.encoders.values(), reconstructions, sources)
    columns = matched_EN.T.double().numpy(), mismatched_EN.mean(0).double().numpy(), np.zeros(7)
    expected = unified_score.unified_score(*columns, ["coarse", "fine"], ["fine"], 50, 3)
    assert metric.compute() == pytest.approx(expected, abs=1e-12)


def test_numbers_that_make_no_sense_are_refused_on_the_command_line(capsys):
    parser = Parser()
    parser.add_argument("--score", type=UnifiedScore)
    encoders = '{"layout": {"class_path": "uae.encoders.LayoutEncoder", "init_args": {"cells": CELLS}}}'
    for bootstrap, cells, message in ((-1, 3, "score.init_args.bootstrap"), (0, 0, "encoders.init_args.cells")):
        words = [f"--score.encoders={encoders.replace('CELLS', str(cells))}", f"--score.bootstrap={bootstrap}"]
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_what_the_last_batch_scored_is_of_the_held_out_encoders_only():
    sources, reconstructions = torch.rand(2, 7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoders = {"coarse": LayoutEncoder(2), "rewarded": LayoutEncoder(4), "fine": LayoutEncoder(8)}
    metric = UnifiedScore(encoders, held_out=("fine", "coarse"), bootstrap=0)
    metric.update(reconstructions[:3], sources[:3])
    first_N = metric.last_held_out()
    metric.update(reconstructions[3:], sources[3:])
    both_N = torch.cat([first_N, metric.last_held_out()])
    expected = (similarity(encoders[name].embed(reconstructions), encoders[name].embed(sources)) for name in ("coarse", "fine"))
    assert torch.allclose(both_N, sum(expected) / 2)
    assert both_N.mean().item() == pytest.approx(metric.compute()["held_out"], abs=1e-6)
