"""X-Omni as captioner and image policy, against a plain reference, transformers' GLM-Image and diffusers' own FLUX pipeline."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.models.tokens.x_omni_reference import Plain
from uae.models.captioners.loading import Reading
from uae.models.finetune import Full, LoRA
from uae.models.tokens.policy import TokenSampling
from uae.models.tokens.x_omni_decoder import Decoding
from uae.models.tokens.x_omni_image_tokenizer import Resizing
from uae.rehearsal import x_omni as stand_in
from uae.rehearsal.catalog import write
from uae.systems.x_omni import XOmni
from uae.types import Sampling
from uae.weights.placement import Placement

NAMES = ["X-Omni/X-Omni-En", "black-forest-labs/FLUX.1-dev"]
CAPTIONS = ["a cat", "a large red circle on the left of a blue square"]
CLOSE = {"atol": 1e-5, "rtol": 0}
SETTINGS = [TokenSampling(w, 0.7, mode) for w in (1.0, 5.0) for mode in ("guided", "guided_detach_uncond")]
SIZE = {"height": 48, "width": 32}  # 3 rows of 2 tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder, only=NAMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UAE_CHECKPOINTS", str(folder))
        decoding = Decoding(placement=Placement("float32"))
        return XOmni(**SIZE, decoding=decoding, reading=Reading(dtype="float32")).build()


@pytest.fixture(scope="module")
def plain(made):
    base = made.captioner.learner.network.base
    config = base.config
    return Plain(base.state_dict(), {**config.to_dict(), "rope_theta": 1000000.0})


@pytest.fixture
def assemble(made):
    def assembled(sampling=TokenSampling(5.0), dtype=torch.float32, rows=16):  # noqa: B008
        umm = copy.deepcopy(made)
        umm.renderer.sampling, umm.renderer.rows = sampling, rows
        umm.captioner.learner.network.to(dtype)
        assert umm.renderer.learner is umm.captioner.learner
        return umm

    return assembled


def pictures():
    noise = torch.Generator().manual_seed(5)
    return [torch.rand(3, *size, generator=noise) for size in ((40, 64), (24, 24))]


def ids_of(umm, text):
    return umm.captioner.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


# ------------------------------------------------------------------------------------------------- the language model


@torch.no_grad()
def test_states_and_logits_are_those_of_the_plain_reference(assemble, plain):
    """Text before, inside and behind an image: every combination of token and layer occurs."""
    umm = assemble(dtype=torch.float64)
    model, first = umm.captioner.learner.network.base, plain.config["vocab_size"]
    ids = ids_of(umm, "a cat<SOM>2 3<IMAGE><MM-Token-5><MM-Token-63><MM-Token-0><MM-Token-7><EOM>in the sun<|im_end|>")
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    assert 4 < sum(i >= first for i in ids) < len(ids) - 4
    torch.testing.assert_close(hidden, plain.hidden(ids), **CLOSE)
    torch.testing.assert_close(model(torch.tensor([ids])).logits[0], plain.text(ids), **CLOSE)
    head, _ = umm.captioner.learner.network.image_head()
    torch.testing.assert_close(hidden @ head.T, plain.codes(ids), **CLOSE)
    config = plain.config  # each of these is another model on these tokens
    for name, value in {"num_mm_adap_layers": 1, "num_mm_head_layers": 2}.items():
        other = Plain(plain.state, {**config, name: value})
        assert (other.hidden(ids) - hidden).abs().max() > 0.01


@pytest.mark.parametrize("sampling", SETTINGS)
def test_ratio_of_images_is_one(assemble, sampling):
    umm = assemble(sampling, torch.float64)
    drawn = umm.renderer.sample(umm.conditioner.encode(CAPTIONS), [3, 4])
    assert drawn.actions_RS.shape == (2, 6)
    torch.testing.assert_close(umm.renderer.logprobs(drawn).detach(), drawn.logp_RS, atol=1e-6, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@torch.no_grad()
def test_logprobs_are_of_the_codes_alone(assemble, plain, guidance):
    """softmax((u + w (c - u)) / t) over the codes; the prompts with and without the caption are as long as they are."""
    umm = assemble(TokenSampling(guidance, 0.7), torch.float64)
    drawn = umm.renderer.sample(umm.conditioner.encode(CAPTIONS), [3, 4])
    first = plain.config["vocab_size"]
    for caption, tokens_S, logp_S in zip(CAPTIONS, drawn.actions_RS, drawn.logp_RS, strict=True):
        said = (tokens_S + first).tolist()
        c, u = (plain.codes([*ids_of(umm, text), *said])[-7:-1] for text in (f"{caption}<SOM>3 2<IMAGE>", "<SOM>3 2<IMAGE>"))
        expected = ((u + guidance * (c - u)) / 0.7).log_softmax(-1).gather(1, tokens_S[:, None])[:, 0]
        torch.testing.assert_close(logp_S, expected, **CLOSE)


@torch.no_grad()
def test_an_image_depends_on_its_caption_and_seed_only(assemble):
    together, captions = assemble(rows=16), [*CAPTIONS, CAPTIONS[0]]
    drawn = together.renderer.sample(together.conditioner.encode(captions), [3, 4, 5])
    images = together.renderer.pixels(drawn)
    assert images.shape == (3, 3, 48, 32)
    assert images.std() > 0.01
    assert not torch.equal(drawn.actions_RS[0], drawn.actions_RS[2])
    alone = assemble(rows=1)
    for n, (caption, seed) in enumerate(zip(captions, [3, 4, 5], strict=True)):
        one = alone.renderer.sample(alone.conditioner.encode([caption]), [seed])
        assert torch.equal(one.actions_RS[0], drawn.actions_RS[n])
        torch.testing.assert_close(alone.renderer.pixels(one)[0], images[n], **CLOSE)
        assert torch.equal(together.renderer.pixels(drawn.of([n], 1)), alone.renderer.pixels(drawn.select([n])))
    other = replace(drawn, seeds=(1, 2, 3))
    assert (together.renderer.pixels(other) - images).abs().amax((1, 2, 3)).min() > 0.01  # noise is no action, but it shows


# -------------------------------------------------------------------------------------------------- images to tokens


@torch.no_grad()
def test_tokens_are_those_of_glm_image(made):
    """Transformers has the same two networks under other names."""
    from transformers import GlmImageVisionConfig, GlmImageVisionModel, GlmImageVQVAE, GlmImageVQVAEConfig

    tower, projector = stand_in.image_tokenizer(seed=12)
    width, codes = stand_in.FEATURES, stand_in.CODES
    vit = GlmImageVisionModel(
        GlmImageVisionConfig(
            depth=2, hidden_size=width, num_heads=16, intermediate_size=4 * width, patch_size=16, image_size=16 * stand_in.SIDE
        )
    )
    renamed = {name: value for name, value in tower.items() if name.startswith(("patch_embed", "blocks"))}
    vit.load_state_dict({**renamed, "embeddings.position_embedding.weight": tower["pos_embed"][0]})
    vq = GlmImageVQVAE(GlmImageVQVAEConfig(embed_dim=stand_in.CODE_WIDTH, num_embeddings=codes, latent_channels=width))
    vq.load_state_dict({name: value for name, value in projector.items() if not name.startswith("post_conv")})
    noise, seen = torch.Generator().manual_seed(0), set()
    for height, width in ((48, 80), (128, 128), (16, 96)):
        pixels = torch.randn(1, 3, height, width, generator=noise)
        rows, columns = height // 16, width // 16
        patches = pixels.view(3, rows, 16, columns, 16).permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
        features = vit.eval()(patches, torch.tensor([[1, rows, columns]])).last_hidden_state
        expected = vq.encode(features.T.reshape(1, -1, rows, columns)).image_tokens
        tokens = made.captioner.vision.encode(pixels)
        assert tokens.shape == (1, rows, columns)
        assert torch.equal(tokens.flatten(), expected.flatten())
        seen |= set(tokens.flatten().tolist())
    assert len(seen) > 20


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((24, 24), (32, 32)), ((24, 48), (32, 64)), ((200, 100), (96, 48)), ((70, 41), (64, 48)), ((96, 32), (96, 32))],
)
def test_images_keep_their_aspect_ratio(made, size, scaled):
    assert made.captioner.resizing.size(*size) == scaled


def test_images_are_scaled_as_pillow_does():
    from PIL import Image

    picture = pictures()[0]
    resizing = Resizing(short_size=32, long_size=96, min_short_size=16)
    eight = (picture * 255).round().to(torch.uint8)
    scaled = Image.fromarray(eight.permute(1, 2, 0).numpy()).resize((64, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(scaled)).float().permute(2, 0, 1) / 127.5 - 1
    assert resizing.size(64, 40) == (64, 32)
    torch.testing.assert_close(resizing.pixels(picture), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(100, 10), (15, 30)])
def test_images_that_are_too_small_or_too_narrow_are_refused(made, size):
    with pytest.raises(ValueError, match=r"16 pixels or more .* at most 3 times as long; change data.init_args.image_size"):
        made.captioner.resizing.size(*size)


# ---------------------------------------------------------------------------------------------------------- captions


def test_a_prompt_is_the_written_image_and_the_question(made):
    context = made.captioner.prepare(pictures(), "What is it?")
    words = made.captioner.processor.tokenizer
    for picture, ids_P, mask_P in zip(pictures(), context.rows["input_ids"], context.rows["attention_mask"], strict=True):
        codes = made.captioner.vision.encode(made.captioner.resizing.pixels(picture)[None])[0]
        image = "".join(f"<MM-Token-{code}>" for code in codes.flatten().tolist())
        turn = f"<SOM>{codes.shape[0]} {codes.shape[1]}<IMAGE>{image}<EOM>\nWhat is it?"
        said = words.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False)
        assert ids_P[mask_P.bool()].tolist() == words(said, add_special_tokens=False)["input_ids"]


def test_ratio_of_captions_is_one(assemble):
    captioner = assemble().captioner
    rollout = captioner.sample(captioner.prepare(pictures()), 3, Sampling(max_tokens=20), range(6))
    torch.testing.assert_close(captioner.logprobs(rollout).detach(), rollout.logp_RS, atol=2e-5, rtol=0)
    assert (rollout.mask_RS.sum(1) < 20).any()
    assert len(set(rollout.texts)) > 3


@torch.no_grad()
def test_captions_are_scored_as_in_one_plain_pass(assemble, plain):
    captioner = assemble(dtype=torch.float64).captioner
    rollout = captioner.sample(captioner.prepare(pictures()), 2, Sampling(max_tokens=8), range(4))
    ours, banned = captioner.logprobs(rollout), captioner.learner.network.banned_ids
    for n in range(4):
        ids = rollout.context.rows["input_ids"][n // 2][rollout.context.rows["attention_mask"][n // 2].bool()].tolist()
        tokens = rollout.tokens_NT[n][rollout.mask_RS[n].bool()]
        logits = plain.text([*ids, *tokens.tolist()])[len(ids) - 1 : -1].index_fill(1, banned, -torch.inf)
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(ours[n, : len(tokens)], expected, **CLOSE)


def test_captions_hold_text_and_their_end_only(made):
    captioner = made.captioner
    words, banned = captioner.processor.tokenizer, set(captioner.learner.network.banned_ids.tolist())
    allowed = set(range(captioner.learner.network.base.config.vocab_size)) - banned
    assert captioner.end_ids == words.convert_tokens_to_ids(["<|im_end|>"])
    assert not [token for token in words.convert_ids_to_tokens(sorted(allowed)) if token.startswith("<|") and "im_end" not in token]
    assert max(banned) < captioner.learner.network.base.config.vocab_size


# ------------------------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("reads", [True, False])
@torch.no_grad()
def test_pixels_are_those_of_the_flux_pipeline_with_features_between_its_stacks(assemble, reads):
    """Diffusers' own call with its true guidance; features join before the first single block, in the positive pass only."""
    umm = assemble()
    decoder = umm.renderer.decoder
    decoder.decoding = replace(decoder.decoding, reads_caption=reads)
    drawn = umm.renderer.sample(umm.conditioner.encode(CAPTIONS), [3, 4])
    images = umm.renderer.pixels(drawn)
    pipe, passes = copy.deepcopy(decoder.pipe), []
    for n, caption in enumerate(CAPTIONS):
        latents = umm.renderer.vision.decode(drawn.actions_RS[n].view(1, 3, 2))
        added, passes = latents @ decoder.embed.weight.T, []

        def join(block, arguments, named, added=added, passes=passes):
            passes.append(len(passes) % 2 == 0)
            return arguments, {**named, "hidden_states": named["hidden_states"] + added * passes[-1]}

        hook = pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(join, with_kwargs=True)
        expected = pipe(
            prompt=caption if reads else "", negative_prompt="", true_cfg_scale=2.0, guidance_scale=1.0, height=48, width=32,
            num_inference_steps=2, generator=torch.Generator().manual_seed(drawn.seeds[n]), output_type="pt",
        ).images[0]  # fmt: skip
        hook.remove()
        assert len(passes) == 4
        torch.testing.assert_close(images[n], expected, **CLOSE)
        assert (added.abs().max()) > 0.1


# ------------------------------------------------------------------------------------------------------ what trains


def frozen_state(umm):
    return [{name: value.clone() for name, value in part.state_dict().items()} for part in umm.renderer.modules()]


@pytest.mark.parametrize("finetune", [LoRA(4, 8), Full()], ids=["lora", "full"])
def test_gradients_reach_the_language_model_and_nothing_else(assemble, finetune):
    umm = assemble()
    policy, before, condition = umm.captioner.learner.network, frozen_state(umm), umm.conditioner.encode(CAPTIONS)
    finetune.attach(umm.captioner.learner, keep_reference=True)
    policy.train()
    drawn = umm.renderer.sample(condition, [3, 4])
    start = umm.renderer.logprobs(drawn).detach()
    rollout = umm.captioner.sample(umm.captioner.prepare(pictures()), 2, Sampling(max_tokens=6), range(4))
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert len(trained) == (2 * 7 * stand_in.LAYERS if isinstance(finetune, LoRA) else len(list(policy.base.parameters())))

    def reached(loss):
        grads = torch.autograd.grad(loss, trained.values(), allow_unused=True)
        return {name for name, grad in zip(trained, grads, strict=True) if grad is not None and grad.abs().max() > 0}

    captions, images = reached(umm.captioner.logprobs(rollout).sum()), reached(umm.renderer.logprobs(drawn).sum())
    dead = {name for name in trained if "lora_A" in name}  # their gradient is 0 while the other factor is
    aside = {half: {name for name in trained if re.search(pattern, name)} for half, pattern in policy.used_only_for.items()}
    assert trained.keys() - captions - dead == aside["images"] - dead
    assert trained.keys() - images - dead == aside["captions"] - dead
    (umm.renderer.logprobs(drawn).sum() + umm.captioner.logprobs(rollout).sum()).backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    for part, kept in zip(umm.renderer.modules(), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in part.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
    assert (umm.renderer.logprobs(drawn) - start).abs().max() > 1e-3
    with umm.renderer.learner.reference(), torch.no_grad():
        torch.testing.assert_close(umm.renderer.logprobs(drawn), start, **CLOSE)


def test_checkpointing_changes_no_gradient(assemble):
    grads = []
    for recompute in (False, True):
        umm = assemble(dtype=torch.float64)
        umm.captioner.learner.network.gradient_checkpointing = recompute
        drawn = umm.renderer.sample(umm.conditioner.encode(CAPTIONS), [3, 4])
        rollout = umm.captioner.sample(umm.captioner.prepare(pictures()), 2, Sampling(max_tokens=6), range(4))
        (umm.renderer.logprobs(drawn).sum() + umm.captioner.logprobs(rollout).sum()).backward()
        grads.append({name: p.grad for name, p in umm.captioner.learner.network.named_parameters()})
    assert all(torch.allclose(value, grads[1][name], atol=1e-6) for name, value in grads[0].items())


@pytest.mark.parametrize("half", ["captions", "images"])
def test_it_learns_by_heart(assemble, half):
    """Twenty steps of an adapter: the image that it reads becomes the one that it draws; what it first said becomes certain."""
    umm = assemble(TokenSampling(1.0))
    LoRA(8, 16).attach(umm.captioner.learner, keep_reference=False)
    picture = torch.rand(3, 48, 32, generator=torch.Generator().manual_seed(1))
    if half == "captions":
        policy, actions = umm.captioner, umm.captioner.sample(umm.captioner.prepare([picture]), 1, Sampling(max_tokens=8), [0])
    else:
        policy, target_S = umm.renderer, umm.captioner.vision.encode(picture[None] * 2 - 1).flatten()
        actions = replace(policy.sample(umm.conditioner.encode(CAPTIONS[:1]), [0]), actions_RS=target_S[None])
    optimizer = torch.optim.Adam([p for p in umm.captioner.learner.network.parameters() if p.requires_grad], lr=0.01)
    likelihood = []
    for _ in range(20):
        logp_RS = policy.logprobs(actions)
        likelihood.append(logp_RS.detach().exp().mean().item())
        optimizer.zero_grad()
        (-logp_RS.mean()).backward()
        optimizer.step()
    assert likelihood[0] < 0.3
    assert likelihood[-1] > 0.9
    if half == "images":
        policy.sampling = TokenSampling(1.0, temperature=0.0)
        assert torch.equal(policy.sample(umm.conditioner.encode(CAPTIONS[:1]), [7]).actions_RS[0], target_S)
