"""Janus: the captioner conforms like any other family, images come from the same root, and the VQ model never changes."""

import copy
import re

import pytest
import torch

from tests.models import families
from tests.models.captioners.test_captioner import (  # noqa: F401 (collected here, for this family)
    test_a_caption_ends_with_its_first_end_token,
    test_banned_words_are_never_said,
    test_batch_composition_and_micro_batches_change_nothing,
    test_both_images_and_the_instruction_matter,
    test_every_row_has_its_own_seed,
    test_greedy_equals_generate,
    test_left_padding_changes_nothing,
    test_logprobs_and_gradients_equal_one_plain_forward_per_caption,
    test_ratio_is_one,
    test_samples_follow_the_policy,
    test_tokens_behind_the_end_do_not_matter,
)
from tests.models.families import IDS
from uae.learner import WithoutAdapter
from uae.miniature import tiny
from uae.models.finetune import Full, LoRA
from uae.models.tokens.janus import JanusPolicy, TokenConditioner, unify
from uae.models.tokens.policy import ImageTokenPolicy, TokenSampling
from uae.policies import prepare
from uae.types import Sampling

CLOSE = {"atol": 1e-5, "rtol": 0}
BEGIN, IMAGE, BOI, EOI, PAD = "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>"
TEMPLATE = "user {caption} assistant "
TEXTS = ["red ring", "large blue square on navy"]


def janus(layers=2):
    """Reads 4 tokens an image and draws 4, out of 12."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusImageProcessor,
        JanusProcessor,
        PreTrainedTokenizerFast,
    )

    words = PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer().backend_tokenizer, bos_token=BEGIN, eos_token="<|im_end|>", pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "boi_token": BOI, "eoi_token": EOI}, padding_side="left",
    )  # fmt: skip
    text = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(IDS), "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        "projection_dim": 64, "num_image_tokens": 4, "mlp_ratio": 2.0,
    }  # fmt: skip
    codes = {
        "embed_dim": 8, "num_embeddings": 12, "latent_channels": 32, "base_channels": 32, "num_res_blocks": 0,
        "channel_multiplier": [1, 1, 1, 1], "projection_dim": 64, "image_token_embed_dim": 64,
    }  # fmt: skip
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=codes, image_token_id=IDS[IMAGE], tie_word_embeddings=False)
    template = tiny.CHAT_TEMPLATE.replace(f"{BOI} ", "").replace(f"{EOI} ", "")
    pixels = JanusImageProcessor(size={"height": 16, "width": 16}, min_size=1)
    return JanusForConditionalGeneration(config), JanusProcessor(pixels, words, template, num_image_tokens=4)


@pytest.fixture(scope="module")
def made():
    """Not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "janus", janus, raising=False)
        captioner = families.create("janus")
    captioner.end_ids = [IDS[word] for word in ("and", "gray", "tiny", "ring")]  # its own would be the likeliest start
    return unify(captioner, TokenSampling(5.0), template=TEMPLATE)


@pytest.fixture
def captioner(made):
    return made.captioner


@pytest.fixture
def umm(made):
    return copy.deepcopy(made)


def condition(umm):
    return umm.conditioner.encode(TEXTS)


def trainable(umm):
    return {name for name, p in umm.captioner.learner.network.model.named_parameters() if p.requires_grad}


# ----------------------------------------------------------------------------------------------------------- captions


def test_the_fixture_holds_the_hard_cases(captioner, rollout):
    lengths = rollout.mask_RS.sum(1)
    assert lengths.min() < 4
    assert lengths.max() == 8
    assert len(set(rollout.texts)) > 6


def test_what_belongs_to_images_is_never_said(captioner):
    assert {IDS[IMAGE], IDS[BOI], IDS[EOI], IDS[PAD]} <= set(captioner.learner.network.banned_ids.tolist())


# ------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_with_and_without_the_caption(made):
    prompts = condition(made)
    rows = [["red", "ring"], ["large", "blue", "square", "on", "navy"]]
    for n, caption in enumerate(rows):
        whole = [BEGIN, "user", *caption, "assistant", BOI]
        bare = [BEGIN, *[PAD] * (len(whole) - 2), BOI]
        at = prompts.mask_NL[n].bool()
        assert prompts.ids_NL[n][at].tolist() == [IDS[word] for word in whole]
        assert prompts.uncond_ids_NL[n][at].tolist() == [IDS[word] for word in bare]
        assert (prompts.ids_NL[n][~at] == IDS[PAD]).all()
    assert prompts.mask_NL.sum(1).tolist() == [6, 9]
    assert len(prompts.index([1])) == 1


def test_a_caption_that_is_too_long_is_cut_and_counted(made):
    conditioner = TokenConditioner(made.captioner.processor.tokenizer, TEMPLATE, max_tokens=8)
    with pytest.warns(UserWarning, match="1 of 2 captions"):
        prompts = conditioner.encode(TEXTS)
    assert conditioner.truncated == 1
    words = made.captioner.processor.tokenizer.convert_ids_to_tokens(prompts.ids_NL[1])
    assert words == [BEGIN, "user", "large", "blue", "square", "on", "assistant", BOI]


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(("guidance", "mode"), [(1.0, "guided"), (5.0, "guided"), (5.0, "guided_detach_uncond"), (1.0, "conditional")])
def test_image_ratio_is_one(umm, guidance, mode):
    umm.renderer.sampling = TokenSampling(guidance, 1.0, mode)
    drawn = umm.renderer.sample(condition(umm), [1, 2])
    logp_NS = umm.renderer.logprobs(drawn)
    torch.testing.assert_close(logp_NS.detach(), drawn.logp_RS, **CLOSE)
    assert logp_NS.shape == (2, 4)


@torch.no_grad()
def test_image_logprobs_equal_the_librarys_own_parts(made):
    """One prompt at a time through generation_embeddings, aligner, language model and head."""
    model, drawn = made.captioner.learner.network.model, made.renderer.sample(condition(made), [1, 2])
    for n, logp_S in enumerate(made.renderer.logprobs(drawn)):
        at, tokens_S = drawn.condition.mask_NL[n].bool(), drawn.actions_RS[n]
        logits = []
        for ids_NL in (drawn.condition.ids_NL, drawn.condition.uncond_ids_NL):
            said = model.prepare_embeddings_for_image_generation(tokens_S[None, :-1])
            embeds = torch.cat([model.get_input_embeddings()(ids_NL[n][at][None]), said], dim=1)
            hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -4:]
            logits.append(model.model.generation_head(hidden).double())
        c, u = logits
        expected_S = (u + 5.0 * (c - u)).log_softmax(-1)[range(4), tokens_S].float()
        torch.testing.assert_close(logp_S, expected_S, **CLOSE)


@torch.no_grad()
def test_pixels_are_the_decoded_tokens(made):
    drawn = made.renderer.sample(condition(made), [1, 2])
    images = made.renderer.pixels(drawn)
    assert images.shape == (2, 3, 16, 16)
    vq = made.captioner.learner.network.model.model.vqmodel
    for tokens, image in zip(drawn.actions_RS, images, strict=True):
        torch.testing.assert_close(image, ((vq.decode(tokens[None])[0] + 1) / 2).clamp(0, 1), **CLOSE)
    assert torch.equal(made.renderer.render(condition(made), [1, 2]), images)
    assert not torch.equal(images[0], images[1])


# ---------------------------------------------------------------------------------------------------------- one policy


def step(umm, size=1e-2):
    """An update from images."""
    drawn = umm.renderer.sample(condition(umm), [1, 2])
    parameters = [p for p in umm.renderer.learner.network.parameters() if p.requires_grad]
    umm.renderer.logprobs(drawn).sum().backward()
    torch.optim.AdamW(parameters, lr=size, weight_decay=0.1).step()


@pytest.mark.parametrize("finetune", [LoRA(rank=2), Full()])
@pytest.mark.parametrize("attached", ["captioner", "renderer"])
def test_captioner_and_renderer_are_one_policy(umm, images, finetune, attached):
    """Whichever the finetuning is attached to; an update from images moves captions, and the reference neither."""
    finetune.attach(getattr(umm, attached).learner, keep_reference=True)
    assert umm.captioner.learner.network is umm.renderer.learner.network
    rollout = umm.captioner.sample(umm.captioner.prepare(images), 2, Sampling(1.0, 6), range(4))
    drawn = umm.renderer.sample(condition(umm), [1, 2])

    @torch.no_grad()
    def both():
        return umm.captioner.logprobs(rollout), umm.renderer.logprobs(drawn)

    start = both()
    for _ in range(2):
        step(umm)
    moved = both()
    for role in (umm.captioner, umm.renderer):
        with role.learner.reference():
            assert umm.captioner.learner.network is umm.renderer.learner.network
            assert all(torch.equal(a, b) for a, b in zip(both(), start, strict=True))
    for now, before, after in zip(both(), start, moved, strict=True):
        assert torch.equal(now, after)
        assert (now - before).abs().max() > 1e-3


@torch.no_grad()
def test_the_reference_embeds_with_its_own_tables(umm):
    """Fed the policy's embeddings, as in T2I-R1, it would move with them."""
    Full().attach(umm.captioner.learner, keep_reference=True)
    drawn = umm.renderer.sample(condition(umm), [1, 2])
    start, model = umm.renderer.logprobs(drawn), umm.captioner.learner.network.model
    for table in (model.get_input_embeddings(), model.model.generation_embeddings):
        table.weight.add_(torch.randn_like(table.weight) * 0.3)
        with umm.renderer.learner.reference():
            assert torch.equal(umm.renderer.logprobs(drawn), start)
        moved = umm.renderer.logprobs(drawn)
        assert (moved - start).abs().max() > 1e-3


def test_gradients_reach_what_makes_each_stream(umm, images):
    """Names without number: what an update from captions, and one from images, can move in a full finetuning."""
    Full(".").attach(umm.captioner.learner, keep_reference=False)
    rollout = umm.captioner.sample(umm.captioner.prepare(images), 2, Sampling(1.0, 6), range(4))
    drawn, reached = umm.renderer.sample(condition(umm), [1, 2]), []
    for logp in (umm.captioner.logprobs(rollout), umm.renderer.logprobs(drawn)):
        umm.captioner.learner.network.zero_grad()
        logp.sum().backward()
        named = umm.captioner.learner.network.model.named_parameters()
        names = {name for name, p in named if p.grad is not None and p.grad.any()}
        reached.append({re.match(r"lm_head|model\.\w+", name)[0].removeprefix("model.") for name in names})
    assert reached[0] == {"vision_model", "aligner", "language_model", "lm_head"}
    assert reached[1] == {"generation_embeddings", "generation_aligner", "generation_head", "language_model"}


@pytest.mark.parametrize("finetune", [LoRA(rank=2), LoRA(rank=2, target_modules="all-linear"), Full(), Full(".")])
def test_the_image_tokenizer_never_trains(umm, finetune):
    vq = umm.captioner.learner.network.model.model.vqmodel
    before = copy.deepcopy(vq.state_dict())
    finetune.attach(umm.renderer.learner, keep_reference=True)
    umm.captioner.learner.network.train()
    assert not any(module.training for module in vq.modules())
    assert not any("vqmodel" in name for name, _ in umm.captioner.learner.network.named_parameters())
    for _ in range(2):
        step(umm)
    assert len(before) > 40
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())


def test_lora_trains_the_language_model_only(umm):
    LoRA(rank=2).attach(umm.renderer.learner, keep_reference=True)
    assert {"language_model" in name and "lora_" in name for name in trainable(umm)} == {True}
    assert umm.renderer.learner is umm.captioner.learner
    assert umm.captioner.learner.start == WithoutAdapter()
    step(umm)
    reached = {n for n, p in umm.renderer.learner.network.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name in trainable(umm) if "lora_B" in name}  # A waits for B, which starts at 0


@pytest.mark.parametrize("finetune", [Full("."), LoRA(rank=2, target_modules="all-linear")], ids=["full", "lora"])
@pytest.mark.parametrize("train", ["captions", "images", "both"])
def test_what_trains_is_what_the_loss_of_the_stage_reaches(umm, images, finetune, train):
    """DDP waits for the gradient of everything that trains, also after the reference had its turn."""
    umm = prepare(umm, train, ["caption", "image"], finetune, None)
    rollout = umm.captioner.sample(umm.captioner.prepare(images), 2, Sampling(1.0, 6), range(4))
    drawn = umm.renderer.sample(condition(umm), [1, 2])
    with umm.captioner.learner.reference():
        umm.captioner.logprobs(rollout)
    losses = {"captions": umm.captioner.logprobs(rollout).sum(), "images": umm.renderer.logprobs(drawn).sum()}
    sum(losses[half] for half in losses if train in (half, "both")).backward()
    named = dict(umm.captioner.learner.network.named_parameters())
    assert {n for n, p in named.items() if p.requires_grad} == {n for n, p in named.items() if p.grad is not None}
    assert any("language_model" in name for name in trainable(umm))


def test_the_state_dict_is_complete_and_a_copy_keeps_it(umm):
    """Exports hold the image tokenizer by the library's names."""
    with torch.random.fork_rng():
        plain = janus()[0]
    state = umm.captioner.learner.network.model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    tokens = torch.tensor([[1, 5, 7, 11]])
    expected = JanusPolicy(plain.eval()).pixels(tokens)
    assert torch.equal(umm.renderer.learner.network.pixels(tokens), expected)


def test_a_captioner_that_draws_nothing_is_refused(created):
    with pytest.raises(TypeError, match="CaptionPolicy draws no images"):
        ImageTokenPolicy(created("qwen2_5_vl").learner)
