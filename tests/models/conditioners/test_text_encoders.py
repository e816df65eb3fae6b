import warnings

import pytest
import torch

from tests.models.pipelines.pipeline_cases import (
    CLOSE,
    FLOAT32,
    REAL_GUIDANCE,
    SEEDS,
    SIDE,
    TEXTS,
    WITH_EMBEDDINGS,
    load,
    plainly,
)
from uae.models.conditioners.text_encoders import PipelineTextConditioner
from uae.models.pipelines.contracts import denoiser_of
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.rendering import Rendering
from uae.weights.placement import Placement

each = pytest.mark.parametrize("name", WITH_EMBEDDINGS)
# the most the longest-reading encoder takes, in letters (one token each), with what it adds to a caption
LIMITS = {"sd3": 256 - 2, "flux": 512 - 2, "sana": 300 - 2, "qwen_image": 512 - 5, "sdxl": 77 - 2}


def render(name, pipe, condition, seeds, guidance=1.0, negative=None):
    rendering = Rendering(SIDE, SIDE, steps=2, guidance=guidance, placement=FLOAT32)
    return DiffusersRenderer(pipe, rendering, negative).render(condition, seeds)


@each
def test_images_are_those_of_the_prompt(name):
    pipe, plain = load(name), load(name)
    conditioner = PipelineTextConditioner(pipe, placement=FLOAT32)
    images = render(name, pipe, conditioner.encode(TEXTS), SEEDS)
    for row, seed in enumerate(SEEDS):
        expected = plainly(name, plain, seed, guidance=1.0, prompt=TEXTS[row])
        torch.testing.assert_close(images[row], expected, **CLOSE)
    assert conditioner.truncated == 0


@each
@pytest.mark.parametrize("text", [None, "ugly"])
def test_guided_images_are_those_of_both_prompts(name, text):
    pipe, plain = load(name), load(name)
    conditioner = PipelineTextConditioner(pipe, placement=FLOAT32)
    negative = conditioner.negative(text)
    assert len(negative) == 1
    images = render(name, pipe, conditioner.encode(TEXTS[:2]), SEEDS[:2], 3.0, negative)
    words = "" if text is None and name in REAL_GUIDANCE else text  # these two do not guide without a text
    words = {} if words is None else {"negative_prompt": words}
    for row in range(2):
        expected = plainly(name, plain, SEEDS[row], guidance=3.0, prompt=TEXTS[row], **words)
        torch.testing.assert_close(images[row], expected, **CLOSE)


@each
def test_embeddings_do_not_depend_on_the_batch_and_need_no_graph(name):
    conditioner = PipelineTextConditioner(load(name), placement=FLOAT32)
    together = conditioner.encode(TEXTS)
    assert len(together) == 4
    assert not together.embeds_NLD.requires_grad
    assert all(not weight.requires_grad for part in conditioner.modules() for weight in part.parameters())
    for row, text in enumerate(TEXTS):
        alone = conditioner.encode([text])
        length = int(alone.mask_NL.sum())
        assert int(together.mask_NL[row].sum()) == length
        kept = together.embeds_NLD[row, : alone.embeds_NLD.shape[1]], alone.embeds_NLD[0]
        torch.testing.assert_close(kept[0][:length], kept[1][:length], **CLOSE)
    fixed = name in ("sd3", "flux", "sdxl")
    assert bool(together.mask_NL.all()) == fixed


@each
def test_captions_beyond_the_limit_are_counted_and_said(name):
    conditioner = PipelineTextConditioner(load(name), placement=FLOAT32)
    limit = LIMITS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fits = conditioner.encode(["b" * limit, "b"])
    with pytest.warns(UserWarning, match=r"2 of 3 captions .* model.init_args.sampling.max_tokens") as caught:
        conditioner.encode(["b" * (limit + 1), "b", "b" * (limit + 5) + "c"])
    assert len(caught) == 1
    assert ("caption_tokens" in str(caught[0].message)) == (name != "sdxl")
    assert conditioner.truncated == 2
    # What is beyond the limit is indeed not read (but for five tokens that Qwen-Image puts behind the caption and cuts
    # first), and the limit is: one letter less is another embedding.
    with pytest.warns(UserWarning, match="2 of 2"):
        over = conditioner.encode(["b" * (limit + 5) + letter for letter in "cd"])
    torch.testing.assert_close(over.embeds_NLD[0], over.embeds_NLD[1], **CLOSE)
    shorter = conditioner.encode(["b" * (limit - 1)])
    assert shorter.embeds_NLD.shape != fits.embeds_NLD.shape or (shorter.embeds_NLD[0] - fits.embeds_NLD[0]).abs().max() > 1e-3


def test_the_limit_can_be_chosen():
    pipe = load("sd3")
    conditioner = PipelineTextConditioner(pipe, 96, FLOAT32)
    assert conditioner.encode(["a" * 94]).embeds_NLD.shape[1] == 77 + 96  # both CLIPs beside each other, then T5
    with pytest.warns(
        UserWarning,
        match=r"1 of 1 captions are longer than the 96 tokens .*longest has 97.*"
        r"raise model.init_args.system.init_args.caption_tokens",
    ):
        conditioner.encode(["a" * 95])


def test_without_t5_clip_reads_most():
    pipe = load("sd3")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    with pytest.warns(UserWarning, match="longer than the 77 tokens"):
        PipelineTextConditioner(pipe, placement=FLOAT32).encode(["a" * 76])


def test_text_encoders_and_denoiser_live_apart():
    pipe = load("sd3", Placement("bfloat16"))
    conditioner = PipelineTextConditioner(pipe, placement=Placement("float32", offload=True)).to("cpu")
    renderer = DiffusersRenderer(pipe, Rendering(32, 32, steps=1))
    assert not {*map(id, conditioner.modules())} & {*map(id, renderer.modules())}
    assert len(conditioner.modules()) == 3
    denoiser_of(pipe).to("meta")
    assert conditioner.encode(["a"]).embeds_NLD.dtype == torch.float32
    assert pipe.vae.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"set model.init_args.system.init_args.text_encoders.dtype to bfloat16"):
        PipelineTextConditioner(pipe, placement=Placement("float8"))


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("omnigen", None, "OmniGenPipeline cannot turn captions into embeddings; use a TextConditioner"),
        ("sdxl", 100, "caption_tokens=100 .*reads a fixed number, set it to null"),
        ("sana", 0, "caption_tokens=0 must be at least 1"),
    ],
)
def test_what_a_pipeline_cannot_do(name, tokens, message):
    with pytest.raises(ValueError, match=message):
        PipelineTextConditioner(load(name), tokens, FLOAT32)
