from dataclasses import replace

import pytest
import torch

from tests.models import families
from uae.models.conditioners.answer_states import AnswerStateConditioner
from uae.models.conditioners.states import HiddenStateConditioner, mlp_projector

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def projector(captioner):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp_projector(captioner.policy.base.config.get_text_config().hidden_size, 32, 16)


def plain_states(captioner, rollout, n):
    """Final hidden states at a caption's tokens by the whole model: one row, no padding, no cache."""
    seen = []
    hook = captioner.language_model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    families.plain_logprobs(captioner, row_of(rollout, n))
    hook.remove()
    return seen[-1][0, -int(rollout.mask_NT[n].sum()) :]


def row_of(rollout, n):
    """The rollout of one caption."""
    at = [n]
    return replace(
        rollout,
        tokens_NT=rollout.tokens_NT[at], mask_NT=rollout.mask_NT[at], logp_NT=rollout.logp_NT[at],
        texts=[rollout.texts[n]], context=rollout.context.index([n // rollout.group]), group=1,
    )  # fmt: skip


def test_states_at_the_captions_tokens_behind_image_and_question(captioner, rollout, projector):
    condition = AnswerStateConditioner(captioner, projector).encode(rollout.texts, rollout)
    lengths = rollout.mask_NT.sum(1).long().tolist()
    assert len(set(lengths)) > 1
    assert condition.mask_NL.tolist() == [[1] * n + [0] * (max(lengths) - n) for n in lengths]
    for row, length in enumerate(lengths):
        expected = projector(plain_states(captioner, rollout, row))
        torch.testing.assert_close(condition.embeds_NLD[row, :length], expected, **CLOSE)
        assert condition.embeds_NLD[row, length:].abs().sum() == 0
        torch.testing.assert_close(condition.pooled_NP[row], expected.mean(0), **CLOSE)


def test_the_image_leaks_through_answer_states_and_not_through_text(captioner, images, rollout, projector):
    """The same caption tokens beside other images."""
    other = captioner.prepare([1 - image for image in images])
    swapped = replace(rollout, context=other)
    answer = AnswerStateConditioner(captioner, projector, pooled="none")
    text = HiddenStateConditioner(lambda: captioner.language_model, captioner.processor.tokenizer, projector, "{caption} a")
    seen, unseen = (answer.encode(x.texts, x).embeds_NLD for x in (rollout, swapped))
    assert ((seen - unseen).abs().amax((1, 2)) > 1e-3).all()  # every caption's condition tells the images apart
    read, again = (text.encode(x.texts, x).embeds_NLD for x in (rollout, swapped))
    assert torch.equal(read, again)


def test_gradient_and_what_is_saved(captioner, rollout, projector):
    conditioner = AnswerStateConditioner(captioner, projector, pooled=torch.ones(3))
    assert set(conditioner.state_dict()) == {f"projector.{name}" for name in projector.state_dict()}
    with torch.no_grad():
        condition = conditioner.encode(rollout.texts, rollout)
    assert not condition.embeds_NLD.requires_grad
    assert condition.pooled_NP.tolist() == [[1] * 3] * 12
    conditioner.encode(rollout.texts, rollout).embeds_NLD.square().sum().backward()
    assert projector[0].weight.grad.abs().sum() > 0
    captioner.policy.zero_grad(set_to_none=True)


def test_long_captions_are_cut_and_counted(captioner, rollout, projector):
    conditioner = AnswerStateConditioner(captioner, projector, max_tokens=3)
    whole = AnswerStateConditioner(captioner, projector).encode(rollout.texts, rollout)
    long = int((rollout.mask_NT.sum(1) > 3).sum())
    with pytest.warns(UserWarning, match=rf"{long} of 12 captions .* max_tokens=3"):
        condition = conditioner.encode(rollout.texts, rollout)
    assert conditioner.truncated == long > 0
    torch.testing.assert_close(condition.embeds_NLD, whole.embeds_NLD[:, :3], **CLOSE)


def test_without_its_rollout_there_is_no_answer(captioner, rollout, projector):
    conditioner = AnswerStateConditioner(captioner, projector)
    key = r"model\.init_args\.system\.init_args\.condition_on"
    with pytest.raises(ValueError, match=rf"there is no rollout: condition on text \({key}: text\)"):
        conditioner.encode(["a red square"])
    with pytest.raises(ValueError, match="of the rollout's own captions"):
        conditioner.encode(["other"] * 12, rollout)
