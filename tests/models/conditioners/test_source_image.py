import copy

import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from uae.models.conditioners.joined import JoinedConditioner
from uae.models.conditioners.source_image import SourceImageConditioner
from uae.models.conditioners.states import HiddenStateConditioner, mlp_projector
from uae.types import Sampling

CLOSE = {"atol": 1e-5, "rtol": 0}
SIDE, PATCHES, WIDTH, OUT = 16, 16, 24, 10


@pytest.fixture(scope="module")
def captioner(created):
    return created("qwen2_5_vl")


@pytest.fixture(scope="module")
def rollout(captioner, images):
    """Two images of different sizes, three captions each."""
    return captioner.sample(captioner.prepare(images), 3, Sampling(0.7, 5), range(6))


@pytest.fixture
def conditioner():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = SiglipVisionConfig(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=4
        )
        tower = SiglipVisionModel(config)
        for weight in tower.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, 0, 1 / weight[0].numel() ** 0.5)
        processor = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
        return SourceImageConditioner(tower, processor, mlp_projector(WIDTH, 32, OUT, "silu"))


def plain(conditioner, image):
    """Tokens of one image, which comes as a picture of 8 bits per colour."""
    picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
    pixels = conditioner.processor(images=picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)
    return conditioner.projector(conditioner.tower(pixel_values=pixels).last_hidden_state)[0]


def test_every_caption_gets_the_tokens_of_its_image(conditioner, rollout):
    condition = conditioner.encode(rollout.texts, rollout)
    assert condition.embeds_NLD.shape == (6, PATCHES, OUT)
    assert condition.mask_NL.tolist() == [[1] * PATCHES] * 6
    assert condition.pooled_NP is None
    for row in range(6):
        expected = plain(conditioner, rollout.context.images[row // 3])
        torch.testing.assert_close(condition.embeds_NLD[row], expected, **CLOSE)
    assert (condition.embeds_NLD[0] - condition.embeds_NLD[3]).abs().max() > 0.05  # the images differ: this leaks


def test_the_projector_trains_and_the_tower_does_not(conditioner, rollout):
    conditioner.train()
    assert not conditioner.tower.training
    assert conditioner.projector.training
    conditioner.encode(rollout.texts, rollout).embeds_NLD.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in conditioner.projector.parameters())
    assert not any(p.requires_grad for p in conditioner.tower.parameters())


def test_the_tower_may_be_of_lower_precision(conditioner, rollout):
    exact = conditioner.encode(rollout.texts, rollout).embeds_NLD
    low = copy.deepcopy(conditioner)
    low.tower.to(torch.bfloat16)
    embeds = low.encode(rollout.texts, rollout).embeds_NLD
    assert embeds.dtype == torch.float32
    assert 0 < (embeds - exact).abs().max() < 0.1 * exact.abs().max()


def test_it_joins_a_conditioner_that_reads(conditioner, rollout, captioner):
    words = captioner.processor.tokenizer
    reader = HiddenStateConditioner(captioner.language_model, words, mlp_projector(128, 32, OUT), "{caption} a")
    condition = JoinedConditioner([reader, conditioner], pooled_from=0).encode(rollout.texts, rollout)
    words, tokens = reader.encode(rollout.texts), conditioner.encode(rollout.texts, rollout)
    for row in range(6):
        expected = torch.cat([words.embeds_NLD[row][words.mask_NL[row].bool()], tokens.embeds_NLD[row]])
        torch.testing.assert_close(condition.embeds_NLD[row, : len(expected)], expected, **CLOSE)
        assert condition.mask_NL[row].sum() == len(expected)
    assert torch.equal(condition.pooled_NP, words.pooled_NP)


def test_without_a_rollout_there_is_no_image(conditioner, rollout):
    with pytest.raises(ValueError, match="source image need a rollout, and there is none: leave this conditioner out"):
        conditioner.encode(["a red square"])
    with pytest.raises(ValueError, match="1 captions, but the rollout has 6"):
        conditioner.encode(["a red square"], rollout)
