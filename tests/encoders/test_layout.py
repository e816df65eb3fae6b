import numpy as np
import pytest
import torch

from uae.encoders import LayoutEncoder, similarity


def test_is_the_mean_colour_of_every_cell():
    images = torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    embedding = LayoutEncoder(cells=4).load().embed(images).numpy()
    for n, image in enumerate(images.numpy()):
        cells = [image[c, y * 3 : y * 3 + 3, x * 5 : x * 5 + 5].mean() - 0.5 for c in range(3) for y in range(4) for x in range(4)]
        np.testing.assert_allclose(embedding[n], cells, atol=1e-6)


def test_similarity_is_the_cosine_and_nan_without_a_direction():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    expected = [
        np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(similarity(a, b).numpy(), expected, atol=1e-6)
    a[0], a[1, 2], a[2, 3] = 0.0, torch.nan, torch.inf
    assert similarity(a, b).isnan().tolist() == [True, True, True, False, False]
    with torch.autocast("cpu", torch.bfloat16):
        assert (similarity(b, b * 3) - 1).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"\[5, 7\] and \[1, 7\]"):
        similarity(a, b[:1])
