import numpy as np
import pytest
import torch

from uae.encoders import LayoutEncoder
from uae.rewards import EncoderSimilarity, RegionSimilarity


def scene(seed=0, count=2, height=31, width=42):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_it_is_the_weighted_mean_over_tiles_by_numpy(temperature):
    sources, redrawn = scene(), scene(1, 4, 20, 20)
    reward = RegionSimilarity(LayoutEncoder(2), tiles=3, temperature=temperature)(sources, redrawn, ["x"] * 4)
    embed = lambda image: LayoutEncoder(2).embed(image[None])[0].double().numpy()  # noqa: E731
    expected = []
    for n in range(4):
        cosines = []
        for i in range(3):
            for j in range(3):
                a = embed(sources[n // 2, :, i * 31 // 3 : (i + 1) * 31 // 3, j * 14 : (j + 1) * 14])
                b = embed(redrawn[n, :, i * 20 // 3 : (i + 1) * 20 // 3, j * 20 // 3 : (j + 1) * 20 // 3])
                cosines.append(a @ b / np.sqrt(a @ a * (b @ b)))
        cosines = np.array(cosines)
        weights = np.ones(9) if temperature is None else np.exp(-cosines / temperature)
        expected.append((weights * cosines).sum() / weights.sum())
    np.testing.assert_allclose(reward.flatten().numpy(), expected, atol=1e-5)


def test_a_tiny_wrong_object_costs_more_than_in_the_whole_image():
    source = scene(count=1, height=48, width=48)
    redrawn = source.clone()
    redrawn[:, :, 2:10, 34:42] = 1 - redrawn[:, :, 2:10, 34:42]
    encoder = LayoutEncoder(12)
    rewards = [EncoderSimilarity(encoder), *(RegionSimilarity(encoder, 3, t) for t in (None, 1.0, 0.05))]
    costs = [1 - reward(source, redrawn, ["x"]).item() for reward in rewards]
    assert costs == sorted(costs)
    assert costs[3] > 5 * costs[0] > 0


def test_one_tile_is_the_whole_image_and_too_many_are_refused():
    sources, redrawn = scene(), scene(1, 4)
    encoder = LayoutEncoder(5)
    one, whole = RegionSimilarity(encoder, tiles=1, temperature=0.3), EncoderSimilarity(encoder)
    torch.testing.assert_close(one(sources, redrawn, ["x"] * 4), whole(sources, redrawn, ["x"] * 4))
    assert one.encoders == whole.encoders
    with pytest.raises(ValueError, match="tiles=32 .* 31 x 42 pixels; allowed: up to 31; lower the reward's init_args.tiles"):
        RegionSimilarity(encoder, tiles=32)(sources, redrawn, ["x"] * 4)
