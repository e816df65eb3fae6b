"""Emu3 as captioner and image policy, compared with transformers' own passes and its own ``generate``."""

import copy

import pytest
import torch

from uae.models.captioners.captioner import HFCaptioner
from uae.models.finetune import Full, LoRA
from uae.models.tokens.emu3 import Emu3Captioner, grid, unify, visual_range
from uae.models.tokens.policy import TokenSampling
from uae.rehearsal.emu3 import CODES, emu3
from uae.types import Sampling

CAPTIONS = ["a cat", "a large red circle on the left of a blue square"]
NEGATIVE = "lowres, bad anatomy, worst quality."
HEIGHT, WIDTH = 24, 16  # pixels: 3 rows of 2 tokens
SETTINGS = [TokenSampling(w, 0.7, mode) for w in (1.0, 5.0) for mode in ("guided", "guided_detach_uncond")]
EXACT = {"atol": 1e-10, "rtol": 0}


@pytest.fixture(scope="module")
def made():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = emu3(seed=10)
    for name, moment in model.named_buffers():  # of batch normalisations, which a mode other than eval would show
        if name.endswith("running_var"):
            moment.fill_(0.5)
    return model.eval(), processor


@pytest.fixture
def assemble(made):
    def assembled(sampling=TokenSampling(5.0), dtype=torch.float64, rows=16):  # noqa: B008
        model, processor = copy.deepcopy(made[0]).to(dtype), made[1]
        captioner = HFCaptioner(model, processor, "Describe.")
        return unify(captioner, HEIGHT, WIDTH, sampling, rows, negative=NEGATIVE)

    return assembled


def pictures():
    noise = torch.Generator().manual_seed(5)
    return [torch.rand(3, *size, generator=noise) for size in ((24, 16), (16, 16))]


def prompts(processor, text):
    """As the processor itself prepares the drawing of an image."""
    settings = {"return_for_image_generation": True, "ratio": "2:3", "image_area": HEIGHT * WIDTH}
    given = processor(text=[text], return_tensors="pt", **settings)
    assert given.pop("image_sizes") == [[3, 2]]
    return given


# ------------------------------------------------------------------------------------------------------ image tokens


@pytest.mark.parametrize("sampling", SETTINGS)
def test_ratio_of_images_is_one(assemble, sampling):
    umm = assemble(sampling)
    drawn = umm.renderer.sample(umm.conditioner.encode(CAPTIONS), [3, 4])
    assert drawn.actions_RS.shape == (2, 6)
    torch.testing.assert_close(umm.renderer.logprobs(drawn).detach(), drawn.logp_RS, **EXACT)


def test_ratio_of_images_is_one_in_single_precision(assemble):
    umm = assemble(dtype=torch.float32)
    drawn = umm.renderer.sample(umm.conditioner.encode(CAPTIONS), [3, 4])
    torch.testing.assert_close(umm.renderer.logprobs(drawn).detach(), drawn.logp_RS, atol=2e-5, rtol=0)


def test_prompts_are_the_processors_own(assemble, made):
    conditioner, processor = assemble().conditioner, made[1]
    condition, pad = conditioner.encode(CAPTIONS), processor.tokenizer.pad_token_id
    negative = prompts(processor, NEGATIVE)["input_ids"][0]
    for caption, ids_L, uncond_L in zip(CAPTIONS, condition.ids_NL, condition.uncond_ids_NL, strict=True):
        assert torch.equal(ids_L[ids_L != pad], prompts(processor, caption)["input_ids"][0])
        assert torch.equal(uncond_L[uncond_L != pad], negative)
    assert conditioner.truncated == 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_greedy_images_are_those_of_generate(assemble, made, guidance):
    """With the prefix function and the negative prompt of transformers' documentation, one prompt at a time."""
    model, processor = copy.deepcopy(made[0]).double(), made[1]
    umm = assemble(TokenSampling(guidance, 0.0))
    drawn = umm.renderer.sample(umm.conditioner.encode(CAPTIONS), [0, 0])
    images = umm.renderer.pixels(drawn)
    assert images.shape == (2, 3, HEIGHT, WIDTH)
    words = processor.tokenizer
    closing = words.convert_tokens_to_ids([words.eof_token, words.eoi_token, words.eos_token])
    line_end, visual = words.convert_tokens_to_ids("<|extra_200|>"), model.vocabulary_mapping.image_tokens
    for caption, tokens_S, image in zip(CAPTIONS, drawn.actions_RS, images, strict=True):
        given, negative = prompts(processor, caption), prompts(processor, NEGATIVE)
        length = given["input_ids"].shape[1]

        def allowed(batch, ids, length=length):
            step = len(ids) - length
            if step >= 9:
                return [closing[step - 9]]
            return [line_end] if step % 3 == 2 else visual

        out = model.generate(
            **given, max_new_tokens=12, do_sample=False, prefix_allowed_tokens_fn=allowed, guidance_scale=guidance,
            negative_prompt_ids=negative["input_ids"], negative_prompt_attention_mask=negative["attention_mask"],
        )[:, length:]  # fmt: skip
        assert out[0].view(4, 3)[:3, 2].tolist() == [line_end] * 3
        assert out[0].view(4, 3)[3].tolist() == closing
        assert torch.equal(out[0].view(4, 3)[:3, :2].flatten() - visual[0], tokens_S)
        expected = model.decode_image_tokens(image_tokens=out, height=3, width=2)[0] * 0.5 + 0.5
        torch.testing.assert_close(image, expected.clamp(0, 1).float(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_logprobs_are_of_the_one_head_among_visual_tokens(assemble, made):
    """softmax((u + w (c - u)) / t) over the rows of visual tokens, from whole passes of the library."""
    model, processor = copy.deepcopy(made[0]).double(), made[1]
    umm = assemble(TokenSampling(5.0, 0.7))
    drawn = umm.renderer.sample(umm.conditioner.encode(CAPTIONS), [3, 4])
    line_end, (first, codes) = processor.tokenizer.convert_tokens_to_ids("<|extra_200|>"), visual_range(model)
    for n, caption in enumerate(CAPTIONS):
        rows = (drawn.actions_RS[n].view(3, 2) + first).tolist()
        said = torch.tensor([token for row in rows for token in (*row, line_end)])
        logits = []
        for text in (caption, NEGATIVE):
            ids = prompts(processor, text)["input_ids"][0]
            every = model(torch.cat([ids, said])[None]).logits[0, len(ids) - 1 : -1]
            logits.append(every.view(3, 3, -1)[:, :2].flatten(0, 1)[:, first : first + codes])
        c, u = logits
        expected = ((u + 5.0 * (c - u)) / 0.7).log_softmax(-1).gather(1, drawn.actions_RS[n][:, None])[:, 0]
        torch.testing.assert_close(drawn.logp_RS[n], expected, **EXACT)


def test_an_image_depends_on_its_caption_and_seed_only(assemble):
    together = assemble(rows=16)
    condition = together.conditioner.encode([*CAPTIONS, CAPTIONS[0]])
    drawn = together.renderer.sample(condition, [3, 4, 5])
    assert not torch.equal(drawn.actions_RS[0], drawn.actions_RS[2])
    alone = assemble(rows=1)
    for n, (caption, seed) in enumerate(zip([*CAPTIONS, CAPTIONS[0]], [3, 4, 5], strict=True)):
        one = alone.renderer.sample(alone.conditioner.encode([caption]), [seed])
        assert torch.equal(one.actions_RS[0], drawn.actions_RS[n])
    assert torch.equal(alone.renderer.sample(condition, [3, 4, 5]).actions_RS, drawn.actions_RS)


# ---------------------------------------------------------------------------------------------------------- captions


@torch.no_grad()
def test_an_image_is_read_as_the_library_reads_it_alone(assemble, made):
    """Not as it reads it beside a larger one: padding would change its tokens."""
    model, processor = copy.deepcopy(made[0]).double(), made[1]
    context = assemble().captioner.prepare(pictures())
    seen = set()
    for picture, ids_L, mask_L in zip(pictures(), context.rows["input_ids"], context.rows["attention_mask"], strict=True):
        pixels = (picture * 255).round().to(torch.uint8).numpy()
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]}],
            add_generation_prompt=True, tokenize=False,
        )  # fmt: skip
        given = processor(text=[prompt], images=[pixels], return_tensors="pt")
        tokens = model.model.get_image_tokens(given["pixel_values"], given["image_sizes"]).long()
        expected = given["input_ids"][0].masked_scatter(given["input_ids"][0] == processor.image_token_id, tokens)
        assert torch.equal(ids_L[mask_L.bool()], expected)
        seen.add(tuple(tokens.tolist()))
    assert len(seen) == 2


def test_ratio_of_captions_is_one(assemble):
    captioner = assemble().captioner
    rollout = captioner.sample(captioner.prepare(pictures()), 3, Sampling(max_tokens=20), range(6))
    logp_NT = captioner.logprobs(rollout)
    assert logp_NT.requires_grad
    torch.testing.assert_close(logp_NT.detach().float(), rollout.logp_RS.float(), atol=1e-5, rtol=0)
    ended = rollout.mask_RS.sum(1) < 20
    assert ended.any()
    assert len(set(rollout.texts)) > 3


def test_a_prompt_is_run_once_and_exactly(assemble, made):
    """Captions behind the shared prompt, against whole passes without any cache."""
    umm = assemble()
    captioner, model = umm.captioner, umm.captioner.learner.network.base
    rollout = captioner.sample(captioner.prepare(pictures()), 2, Sampling(max_tokens=8), range(4))
    ours = captioner.logprobs(rollout)
    banned = captioner.learner.network.banned_ids
    for n in range(4):
        ids = rollout.context.rows["input_ids"][n // 2][rollout.context.rows["attention_mask"][n // 2].bool()]
        tokens = rollout.tokens_NT[n][rollout.mask_RS[n].bool()]
        logits = model(torch.cat([ids, tokens])[None]).logits[0, len(ids) - 1 : -1].index_fill(1, banned, -torch.inf)
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(ours[n, : len(tokens)], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("special", [True, False])
def test_captions_hold_no_picture(assemble, made, monkeypatch, special):
    """Also where a tokenizer does not say that visual tokens are special."""
    words = made[1].tokenizer
    marks = {i: token for i, token in words.added_tokens_decoder.items() if "visual" not in token.content}
    if not special:
        monkeypatch.setattr(type(words), "added_tokens_decoder", property(lambda self: marks))
    captioner = assemble().captioner
    banned = set(words.convert_ids_to_tokens(captioner.learner.network.banned_ids.tolist()))
    assert {f"<|visual token {code:06d}|>" for code in range(CODES)} <= banned
    assert {
        "<image>",
        "<|image start|>",
        "<|image end|>",
        "<|image token|>",
        "<|extra_200|>",
        "<|extra_201|>",
    } <= banned
    assert words.bos_token in banned
    assert words.eos_token not in banned
    assert not [token for token in banned if not token.startswith("<")]


# ------------------------------------------------------------------------------------------------------ what trains


def vq_state(umm):
    return {name: value.clone() for name, value in umm.captioner.learner.network.vqmodel.state_dict().items()}


@pytest.mark.parametrize("finetune", [LoRA(4, 8), Full()], ids=["lora", "full"])
def test_gradients_reach_the_language_model_and_not_the_vq_model(assemble, finetune):
    umm = assemble(dtype=torch.float32)
    policy, before, condition = umm.captioner.learner.network, vq_state(umm), umm.conditioner.encode(CAPTIONS)
    finetune.attach(umm.captioner.learner, keep_reference=True)
    assert umm.renderer.learner.network is policy
    policy.train()
    assert not any(part.training for part in policy.vqmodel.modules())
    drawn = umm.renderer.sample(condition, [3, 4])
    start = umm.renderer.logprobs(drawn).detach()
    rollout = umm.captioner.sample(umm.captioner.prepare(pictures()), 2, Sampling(max_tokens=6), range(4))
    (umm.renderer.logprobs(drawn).sum() + umm.captioner.logprobs(rollout).sum()).backward()
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name in trained if "vqmodel" in name]
    assert all(p.grad is not None for p in trained.values())
    assert all("text_model" in name or "lm_head" in name for name in trained)
    torch.optim.SGD(trained.values(), lr=0.1).step()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    assert all(torch.equal(value, before[name]) for name, value in vq_state(umm).items())
    assert (umm.renderer.logprobs(drawn) - start).abs().max() > 1e-3
    with umm.renderer.learner.reference(), torch.no_grad():
        torch.testing.assert_close(umm.renderer.logprobs(drawn), start, atol=1e-5, rtol=0)


def test_checkpointing_changes_no_gradient(made):
    grads = []
    for recompute in (False, True):
        captioner = HFCaptioner(copy.deepcopy(made[0]).double(), made[1], "Describe.")
        captioner.learner.network.gradient_checkpointing = recompute
        umm = unify(captioner, HEIGHT, WIDTH, TokenSampling(5.0), negative=NEGATIVE)
        drawn = umm.renderer.sample(umm.conditioner.encode(CAPTIONS), [3, 4])
        umm.renderer.logprobs(drawn).sum().backward()
        grads.append({name: p.grad for name, p in umm.captioner.learner.network.named_parameters()})
    assert all(torch.allclose(value, grads[1][name], atol=1e-9) for name, value in grads[0].items())


# ---------------------------------------------------------------------------------------------------------- mistakes


def test_sizes_that_no_grid_has_are_refused():
    assert grid((24, 16), 8) == (3, 2)
    with pytest.raises(ValueError, match=r"width=20; allowed: multiples of 8; change model.init_args.system.init_args.width"):
        grid((24, 20), 8)


def test_scattered_visual_tokens_are_refused(made):
    model, processor = copy.deepcopy(made[0]), made[1]
    model.vocabulary_mapping.__dict__.pop("img2bpe", None)  # kept once it is asked for
    marks = model.vocabulary_mapping.vocab_map
    one, other = "<|visual token 000001|>", "<|visual token 000002|>"
    marks[one], marks[other] = marks[other], marks[one]
    with pytest.raises(ValueError, match="scatters the visual tokens"):
        Emu3Captioner(HFCaptioner(model, processor, "Describe."), HEIGHT, WIDTH)
