import jsonargparse
import numpy as np
import pytest
import torch

from uae.encoders import LayoutEncoder
from uae.rewards import (
    BaseReward,
    CaptionFormat,
    EncoderSimilarity,
    RandomReward,
    RegionSimilarity,
    Repetition,
    VLMJudge,
    WeightedReward,
)
from uae.weights.placement import Placement


class Counting(LayoutEncoder):
    """Counts the images it embeds."""

    def __init__(self):
        super().__init__(cells=3)
        self.sizes = []

    def embed(self, images_NCHW):
        self.sizes.append(len(images_NCHW))
        return super().embed(images_NCHW)


@pytest.fixture
def rollout():
    generator = torch.Generator().manual_seed(0)
    sources, reconstructions = (
        torch.rand(2, 3, 12, 12, generator=generator),
        torch.rand(6, 3, 9, 9, generator=generator),
    )
    return sources, reconstructions, [f"caption {n}" for n in range(6)]


def test_similarity_is_the_cosine_with_the_rows_own_source(rollout):
    sources, reconstructions, texts = rollout
    encoder = Counting()
    reward = EncoderSimilarity(encoder).load("cpu")(sources, reconstructions, texts)
    assert encoder.sizes == [2, 6]  # every source once, not once per caption
    f = lambda images: LayoutEncoder(cells=3).embed(images).double().numpy()  # noqa: E731
    expected = np.empty((2, 3))
    for b in range(2):
        for g in range(3):
            x, y = f(sources)[b], f(reconstructions)[b * 3 + g]
            expected[b, g] = x @ y / np.sqrt((x @ x) * (y @ y))
    np.testing.assert_allclose(reward.numpy(), expected, atol=1e-6)
    assert reward.dtype is torch.float32
    assert not reward.requires_grad


def test_identity_scores_one_and_a_broken_image_is_missing(rollout):
    sources, _, texts = rollout
    copies = sources.repeat_interleave(3, 0)
    with torch.autocast("cpu", torch.bfloat16):
        reward = EncoderSimilarity(LayoutEncoder())(sources, copies, texts)
    assert (reward - 1).abs().max() < 1e-6
    copies[4, 0, 0, 0] = torch.nan
    assert EncoderSimilarity(LayoutEncoder())(sources, copies, texts).isnan().tolist() == [
        [False] * 3,
        [False, True, False],
    ]


def test_weighted_sum_and_missing_parts(rollout):
    class Fixed:
        def __init__(self, *rows):
            self.reward_BG, self.device = torch.tensor(rows), None

        def load(self, device="cpu"):
            self.device = device
            return self

        def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
            return self.reward_BG

    nan = float("nan")
    parts = {
        "a": Fixed([1.0, 2.0, nan], [4.0, 5.0, 6.0]),
        "b": Fixed([0.5] * 3, [nan, 0.5, 1.0]),
        "seen": Fixed([nan] * 3, [1.0] * 3),
    }
    reward = WeightedReward(parts, {"a": 2.0, "b": -1.0, "seen": 0})
    assert reward.load("meta") is reward
    assert {part.device for part in parts.values()} == {"meta"}
    result = reward(*rollout)
    expected = torch.tensor([[1.5, 3.5, nan], [nan, 9.5, 11.0]])
    torch.testing.assert_close(result.reward_BG, expected, equal_nan=True)
    assert set(result.parts) == {"a", "b", "seen"}
    torch.testing.assert_close(result.parts["a"], parts["a"].reward_BG, equal_nan=True)


@pytest.mark.parametrize(("parts", "weights", "named"), [("ab", "bc", ["a", "c"]), ("a", "", ["a"]), ("", "c", ["c"]), ("", "", [])])
def test_parts_and_weights_must_match(parts, weights, named):
    keys = r"model\.init_args\.reward\.init_args\.parts and model\.init_args\.reward\.init_args\.weights"
    with pytest.raises(ValueError, match=keys) as error:
        WeightedReward({name: RandomReward() for name in parts}, dict.fromkeys(weights, 1.0))
    assert all(f"'{name}'" in str(error.value) for name in named)


def test_a_reward_tells_the_encoders_it_looks_through():
    class Two(RandomReward):
        encoders = {"fine": LayoutEncoder(8), "coarse": LayoutEncoder(2)}

    clip = LayoutEncoder()
    parts = {"clip": EncoderSimilarity(clip), "noise": RandomReward(), "both": Two()}
    assert parts["clip"].encoders == {"encoder": clip}
    assert parts["noise"].encoders == {}
    expected = {"clip": clip, "both/fine": Two.encoders["fine"], "both/coarse": Two.encoders["coarse"]}
    assert WeightedReward(parts, dict.fromkeys(parts, 1.0)).encoders == expected


def test_random_control_ignores_images_and_repeats_by_seed(rollout):
    sources, reconstructions, texts = rollout
    first, again, other = RandomReward(-1, 3, seed=5), RandomReward(-1, 3, seed=5), RandomReward(-1, 3, seed=6)
    state = torch.get_rng_state()
    rows = torch.cat([first(sources, reconstructions, texts) for _ in range(400)])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(rows[:2], again(1 - sources, 1 - reconstructions, texts[::-1]))
    assert not torch.equal(rows[:2], other(sources, reconstructions, texts))
    assert rows.shape == (800, 3)
    assert rows.min() >= -1
    assert rows.max() < 3
    assert abs(rows.mean() - 1) < 4 * (4 / 12**0.5) / 2400**0.5  # four standard errors of a uniform of width 4
    with pytest.raises(ValueError, match="init_args.low"):
        RandomReward(2, 1)


def test_caption_format_matches_the_whole_caption(rollout):
    texts = ["a red cat", "a red cat.", "the red cat", "a red  cat", "a red cat\n", "a blue dog"]
    reward = CaptionFormat(r"a (red|blue) (cat|dog)")(rollout[0], rollout[1], texts)
    assert reward.tolist() == [[1, 0, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="init_args.pattern"):
        CaptionFormat("(")


@pytest.mark.parametrize("reward", [
    EncoderSimilarity(LayoutEncoder()), RegionSimilarity(LayoutEncoder()), RandomReward(), CaptionFormat(".*"), Repetition(),
    VLMJudge("nobody/nothing"),
])  # fmt: skip
def test_shapes_are_checked(reward, rollout):
    sources, reconstructions, texts = rollout
    for rows, captions in ((5, 5), (6, 5), (0, 0), (1, 1)):
        with pytest.raises(ValueError, match=f"got 2, {rows} and {captions}"):
            reward(sources, reconstructions[:rows], texts[:captions])


def test_configurable_from_yaml():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=WeightedReward)
    parser.add_argument("--part", type=BaseReward)
    placement = {"dtype": "bfloat16", "offload": True}
    encoder = {
        "class_path": "uae.encoders.HFEncoder",
        "init_args": {"path": "not/there", "feature": "cls", "placement": placement},
    }
    layout = {"class_path": "uae.encoders.LayoutEncoder", "init_args": {"cells": 5}}
    tower = {"class_path": "uae.encoders.OpenCLIPEncoder", "init_args": {"name": "ViT-B-32", "pretrained": "x.pt"}}
    parts = {
        name: {"class_path": "uae.rewards.EncoderSimilarity", "init_args": {"encoder": value}}
        for name, value in {"dino": encoder, "layout": layout, "clip": tower}.items()
    }
    parts["form"] = {"class_path": "uae.rewards.CaptionFormat", "init_args": {"pattern": "a+"}}
    parts["noise"] = {"class_path": "uae.rewards.RandomReward", "init_args": {"seed": 3}}
    weights = dict.fromkeys(parts, 0.5)
    config = parser.parse_object({"reward": {"parts": parts, "weights": weights}, "part": parts["noise"]})
    built = parser.instantiate(config)
    assert built.reward.parts["dino"].encoder.path == "not/there"
    assert built.reward.parts["dino"].encoder.placement == Placement("bfloat16", offload=True)
    assert built.reward.parts["clip"].encoder.placement == Placement("float32")
    assert built.reward.parts["layout"].encoder.cells == 5
    assert built.reward.parts["clip"].encoder.name == "ViT-B-32"
    assert built.part.seed == 3
