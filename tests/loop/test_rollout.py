import hashlib
import math
from dataclasses import replace

import pytest
import torch

from uae.measure import sampler_gap
from uae.metrics import similarity
from uae.miniature.data import SceneData
from uae.rewards import RandomReward, WeightedReward
from uae.rollout import Plan, autoencode, caption_seeds, distinct, noise_seeds, parts, replay, roll_out, split
from uae.seeds import seed_of
from uae.types import Sampling

PLAN = Plan(group=3, sampling=Sampling(max_tokens=6), seed=5)


@pytest.fixture(scope="module")
def umm(system):
    return system.build()


@pytest.fixture(scope="module")
def batch():
    return next(iter(SceneData(batch_size=4, train_size=8).train_dataloader()))


def pick(batch, images):
    return {"image": batch["image"][images], "id": batch["id"][images]}


def test_every_stage_feeds_the_next(umm, reward, batch):
    experience = roll_out(umm, reward, batch, PLAN, step=0)
    rollout = experience.rollout
    for n, text in enumerate(rollout.texts):  # row by row, by hand
        seed = noise_seeds(PLAN, batch["id"].tolist(), 0)[n]
        image = umm.renderer.render(umm.conditioner.encode([text]), [seed])
        torch.testing.assert_close(experience.reconstructions_NCHW[n], image[0], atol=1e-5, rtol=0)
        source = batch["image"][n // 3][None]
        encoder = reward.parts["layout"].encoder
        expected = similarity(encoder.embed(source), encoder.embed(image))
        letters = sum(map(ord, text)) % 17 / 17
        found = experience.rewards.reward_BG[n // 3, n % 3].item()
        assert found == pytest.approx(expected.item() + 0.5 * letters, abs=1e-5)
    for b, rewards in enumerate(experience.rewards.reward_BG.double().tolist()):
        mean = sum(rewards) / 3
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 2)
        for g in range(3):
            assert experience.advantage_BG[b, g].item() == pytest.approx((rewards[g] - mean) / (std + 1e-4), rel=1e-3)
    assert set(experience.seconds) == {"caption", "condition", "render", "reward"}
    assert all(seconds > 0 for seconds in experience.seconds.values())


def test_a_sample_depends_on_its_image_id_step_and_seed_only(umm, reward, batch):
    whole = roll_out(umm, reward, batch, PLAN, step=7)
    part = roll_out(umm, reward, pick(batch, [2, 0]), PLAN, step=7)
    assert part.rollout.texts == whole.select([2, 0]).rollout.texts
    torch.testing.assert_close(part.reconstructions_NCHW, whole.select([2, 0]).reconstructions_NCHW, atol=1e-5, rtol=0)
    others = [(replace(PLAN, seed=6), 7), (PLAN, 8)]
    for plan, step in others:
        assert roll_out(umm, reward, batch, plan, step).rollout.texts != whole.rollout.texts


def test_seeds_are_the_documented_hash():
    digest = hashlib.blake2b(b"5/17/3", digest_size=8).digest()
    assert noise_seeds(PLAN, [17], 3) == [int.from_bytes(digest, "big") // 2] * 3
    seeds = caption_seeds(PLAN, range(100), 0) + caption_seeds(PLAN, range(100), 1)
    assert len(set(seeds)) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 23, 4) != seed_of(12, 3, 4)


def test_shared_noise(umm, batch):
    """With one and the same caption, shared noise leaves nothing to tell rows of a group apart."""
    _, shared, _ = autoencode(umm, batch, PLAN, step=0)
    condition = umm.conditioner.encode(["a red ring"] * 12)
    for plan, different in ((PLAN, 4), (replace(PLAN, shared_noise=False), 12)):
        seeds = noise_seeds(plan, batch["id"].tolist(), 0)
        assert len(set(seeds)) == different
        images = umm.renderer.render(condition, seeds).view(4, 3, -1)
        assert torch.equal(images[:, 0], images[:, 1]) == (different == 4)
    _, own, _ = autoencode(umm, batch, replace(PLAN, shared_noise=False), step=0)
    assert not torch.equal(shared, own)


def test_select_takes_whole_groups(umm, reward, batch):
    experience = roll_out(umm, reward, batch, PLAN, step=0)
    part = experience.select([3, 1])
    rows = [9, 10, 11, 3, 4, 5]
    assert part.id_B.tolist() == batch["id"][[3, 1]].tolist()
    assert part.rollout.texts == [experience.rollout.texts[row] for row in rows]
    assert torch.equal(part.reconstructions_NCHW, experience.reconstructions_NCHW[rows])
    assert torch.equal(part.advantage_BG, experience.advantage_BG[[3, 1]])
    assert torch.equal(part.rewards.parts["letters"], experience.rewards.parts["letters"][[3, 1]])
    torch.testing.assert_close(replay(umm.captioner, part.rollout, 2, 1), part.rollout.logp_RS, atol=1e-5, rtol=0)


def test_old_log_probs_are_a_replay_or_those_of_the_first_pass(umm, reward, batch, monkeypatch):
    honest = umm.captioner.logprobs
    monkeypatch.setattr(umm.captioner, "logprobs", lambda rollout: honest(rollout) + 0.1)
    experience = roll_out(umm, reward, batch, PLAN, step=0)
    sampled_NT, kept = experience.rollout.logp_RS, experience.rollout.mask_RS.bool()
    first, second = (one["caption"] for one in split(experience, 2, on_policy=[0]))
    assert first.old_logp_RS is None
    half = len(sampled_NT) // 2
    torch.testing.assert_close(second.old_logp_RS[kept[half:]], sampled_NT[half:][kept[half:]] + 0.1, atol=1e-5, rtol=0)
    logp_NT = first.logprobs()
    assert torch.equal(first.since_rollout(logp_NT), logp_NT)
    assert torch.equal(first.since_rollout(logp_NT + 1), logp_NT)  # a later pass changes nothing
    assert second.since_rollout(logp_NT) is second.old_logp_RS
    assert float(sampler_gap(second)) == pytest.approx(math.exp(0.1) - 1, abs=1e-4)


def test_equal_captions_of_an_image_are_drawn_once(umm, batch, monkeypatch):
    """Where they share their noise, so that the images would be equal, too."""
    rows, render = [], umm.renderer.render
    monkeypatch.setattr(umm.renderer, "render", lambda condition, seeds: rows.append(len(seeds)) or render(condition, seeds))
    greedy = replace(PLAN, sampling=Sampling(temperature=0.0, max_tokens=6))
    for plan, drawn in ((greedy, 4), (replace(greedy, shared_noise=False), 12), (replace(greedy, reconstructions=2), 8)):
        rows.clear()
        rollout, images_NCHW, _ = autoencode(umm, batch, plan, step=0)
        assert sum(rows) == drawn
        texts = [text for text in rollout.texts for _ in range(plan.reconstructions)]
        plain_NCHW = render(umm.conditioner.encode(texts), noise_seeds(plan, batch["id"].tolist(), 0))
        torch.testing.assert_close(images_NCHW, plain_NCHW, atol=1e-5, rtol=0)
    assert distinct(["b", "a", "b", "c", "a"]) == ([0, 1, 3], [0, 1, 0, 2, 1])


def test_parts_are_equal_contiguous_and_complete():
    assert [list(part) for part in parts(6, 3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match=r"6 images.*model\.init_args\.mini_batches=4"):
        parts(6, 4)


def test_one_scale_for_the_whole_batch(umm, batch):
    reward = WeightedReward({"random": RandomReward()}, {"random": 1.0})
    experience = roll_out(umm, reward, batch, replace(PLAN, advantage_scale="batch"), 0)
    values = experience.rewards.reward_BG.double()
    expected = (values - values.mean(1, keepdim=True)) / (values.std() + 1e-4)
    torch.testing.assert_close(experience.advantage_BG.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("missing", ["id", "image"])
def test_an_incomplete_batch_is_refused(umm, reward, batch, missing):
    incomplete = {key: value for key, value in batch.items() if key != missing}
    with pytest.raises(ValueError, match="needs image and id"):
        roll_out(umm, reward, incomplete, PLAN, 0)
