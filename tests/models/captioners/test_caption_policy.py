"""What other parts read of a captioner: the source images, the decoder in force, states at caption tokens."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.models import families
from uae.models.captioners.captioner import HFCaptioner
from uae.models.finetune import Full, LoRA
from uae.types import Sampling

TOLERANCE = {"atol": 1e-5, "rtol": 0}


def plain_states(captioner, context, image, tokens):
    """Hidden states ``[T, D]`` at caption tokens: the whole prompt and the caption in one pass, no padding, no cache."""
    inputs = context.index([image]).inputs()
    real = inputs["attention_mask"][0].bool()
    more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": torch.zeros_like(tokens)}
    for name, x in more.items():
        if name in inputs:
            inputs[name] = torch.cat([inputs[name][0][real], x])[None]
    return captioner.learner.network.base.model(**inputs, use_cache=False).last_hidden_state[0, -len(tokens) :]


# ----------------------------------------------------------------------------------------------------------- context


def test_a_context_holds_its_source_images(captioner, images):
    context = captioner.prepare(images)
    assert [torch.equal(a, b) for a, b in zip(context.images, images, strict=True)] == [True, True]
    assert [x.shape[2] for x in context.index([1, 0, 1]).images] == [40, 24, 40]
    assert [x.shape[2] for x in context.index([0, 0, 1, 1]).images] == [24, 24, 40, 40]
    rollout = captioner.sample(context, 2, Sampling(1.0, 2), range(4))
    assert torch.equal(rollout.of([1], rollout.group).context.images[0], images[1])


@pytest.mark.parametrize("family", ["internvl", "llava_onevision", "qwen2_5_vl"])
def test_what_is_seen_of_an_image_belongs_to_it(created, images, family):
    """Also where the processor hands over the tiles of all images in one pile, and of parts of a part."""
    captioner = created(family)
    several = [*images, images[1].flip(2)]
    together = captioner.prepare(several, ["describe", "describe the red ring", "red"])
    for context, chosen in ((together.index([2, 0]), [2, 0]), (together.index([2, 1, 0]).index([0, 2]), [2, 0])):
        fresh = captioner.prepare([several[i] for i in chosen], [["describe", "describe the red ring", "red"][i] for i in chosen])
        found, expected = context.inputs(), fresh.inputs()
        cut = found["input_ids"].shape[1] - expected["input_ids"].shape[1]  # the padding of a longer batch may stay
        found |= {name: found[name][:, cut:] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in found}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------------------------------------ prompt


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_the_question_may_come_first(created, images, family):
    """Both orders are policies of their own: a ratio of one each, other log-probs than the other's."""
    before = created(family)
    behind = HFCaptioner(before.learner.network.model, before.processor, "describe", image_first=False)
    behind.end_ids = before.end_ids
    image, question = "<|image_pad|>", "describe"
    assert before.prompt(question).index(image) < before.prompt(question).index(question)
    assert behind.prompt(question).index(image) > behind.prompt(question).index(question)
    rollout = behind.sample(behind.prepare(images), 3, Sampling(0.7, 6), range(6))
    torch.testing.assert_close(behind.logprobs(rollout), rollout.logp_RS, **TOLERANCE)
    torch.testing.assert_close(families.plain_logprobs(behind, rollout), rollout.logp_RS, **TOLERANCE)
    other = before.logprobs(replace(rollout, context=before.prepare(images)))
    assert (other - rollout.logp_RS).abs().max() > 1e-2


def test_a_template_that_puts_images_first_is_no_silent_contradiction(fresh):
    image, text = "{% for x in part %}<|image_pad|>{% endfor %}", "describe"
    fresh.processor.chat_template = f"{{% set part = [1] %}}user {image} {text} assistant"
    assert HFCaptioner(fresh.learner.network.model, fresh.processor, text).prompt(text) == "user <|image_pad|> describe assistant"
    behind = HFCaptioner(fresh.learner.network.model, fresh.processor, text, image_first=False)
    with pytest.raises(ValueError, match=r"image_first=False.*reading.image_first to True"):
        behind.prompt(text)


# ------------------------------------------------------------------------------------------------------------ states


@torch.no_grad()
def test_hidden_states_at_caption_tokens(captioner, rollout):
    hidden_NTD = captioner.learner.network.hidden(rollout.context, rollout.tokens_NT, rollout.group)
    assert hidden_NTD.shape[:2] == rollout.tokens_NT.shape
    for n, tokens in enumerate(rollout.tokens_NT):
        plain_TD = plain_states(captioner, rollout.context, n // rollout.group, tokens)
        torch.testing.assert_close(hidden_NTD[n], plain_TD, atol=5e-5, rtol=0)


def test_hidden_states_have_a_gradient(fresh, images):
    rollout = fresh.sample(fresh.prepare(images), 2, Sampling(1.0, 4), range(4))
    norms = []
    for checkpointing in (False, True):
        fresh.learner.network.zero_grad()
        fresh.learner.network.gradient_checkpointing = checkpointing
        fresh.learner.network.hidden(rollout.context, rollout.tokens_NT, 2).square().sum().backward()
        norms.append([p.grad.norm() for p in fresh.learner.network.parameters() if p.grad is not None])
    assert len(norms[0]) > 20
    torch.testing.assert_close(norms[0], norms[1])


def test_every_caption_takes_as_many_passes_as_any_other(fresh, images):
    """A sharded policy gathers and reduces at every pass, so ranks whose captions end at once must not take fewer."""
    passes = {}
    heads = [module for name, module in fresh.learner.network.named_modules() if name.endswith("layers.0")]
    for length in (1, 4):
        seen = passes[length] = []
        hooks = [head.register_forward_hook(lambda *_, seen=seen: seen.append("forward")) for head in heads]
        hooks += [head.register_full_backward_hook(lambda *_, seen=seen: seen.append("backward")) for head in heads]
        rollout = fresh.sample(fresh.prepare(images), 2, Sampling(1.0, 4), range(4))
        rollout = replace(rollout, tokens_NT=rollout.tokens_NT[:, :length], mask_RS=rollout.mask_RS[:, :length])
        seen.clear()
        fresh.logprobs(rollout).sum().backward()
        for hook in hooks:
            hook.remove()
    assert passes[1] == passes[4]
    assert "backward" in passes[1]


@pytest.mark.parametrize("length", [1, 2])
def test_captions_of_one_and_two_tokens(captioner, images, length):
    """Nothing, or a single token, is fed after the prompt: paths of their own in some libraries."""
    captioner = copy.deepcopy(captioner)
    rollout = captioner.sample(captioner.prepare(images), 3, Sampling(1.0, length), range(6))
    assert rollout.tokens_NT.shape[1] == length
    gradients = []
    for logp_NT in (captioner.logprobs(rollout), families.plain_logprobs(captioner, rollout)):
        torch.testing.assert_close(logp_NT, rollout.logp_RS, **TOLERANCE)
        captioner.learner.network.zero_grad()
        (logp_NT * torch.arange(1.0, 7)[:, None]).sum().backward()
        gradients.append(captioner.learner.network.base.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-4 * float(gradients[1].abs().max()))


# ----------------------------------------------------------------------------------------------------------- decoder


def read(captioner, ids):
    return captioner.language_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


@torch.no_grad()
def test_the_language_model_reads_text(captioner):
    """As the whole model does without an image, after the final norm; from token ids or from embeddings."""
    ids = torch.tensor([[families.IDS[word] for word in ("red", "ring", "on", "navy")]])
    states = read(captioner, ids)
    whole = captioner.learner.network.base(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(states, whole.hidden_states[-1], **TOLERANCE)
    torch.testing.assert_close(captioner.learner.network.base.get_output_embeddings()(states), whole.logits, **TOLERANCE)
    embeds = captioner.learner.network.base.get_input_embeddings()(ids)
    again = captioner.language_model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(again, states, **TOLERANCE)


@pytest.mark.parametrize("finetune", [LoRA(rank=2), Full()])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_language_model_is_the_one_in_force(created, family, finetune):
    captioner = copy.deepcopy(created(family))
    ids = torch.tensor([[families.IDS[word] for word in ("red", "ring", "on", "navy")]])
    with torch.no_grad():
        start = read(captioner, ids)
    finetune.attach(captioner.learner, keep_reference=True)
    with torch.no_grad():
        for name, parameter in captioner.learner.network.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "norm" in name):
                parameter += 0.3
        moved = read(captioner, ids)
        with captioner.learner.reference():
            assert torch.equal(read(captioner, ids), start)
        assert torch.equal(read(captioner, ids), moved)
    assert (moved - start).abs().max() > 1e-2
