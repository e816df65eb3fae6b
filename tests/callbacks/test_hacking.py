"""Is the reward cheated: the statistics, the alarm, and the run that it watches."""

import io
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms.functional import pil_to_tensor

from callbacks.checkpoint import RolloutCheckpoint
from callbacks.hacking import KEPT, RewardHacking
from tests.two_processes import run_on_two
from uae.checkpoints.files import CheckpointFiles
from uae.encoders import LayoutEncoder
from uae.files.tiles import GAP, TILE
from uae.metrics import UnifiedScore, agreement
from uae.miniature.data import SceneData
from uae.rewards import CaptionLength

N = 64


def scores(seed=0, count=N):
    """Rewards and held-out scores of a start that agree somewhat, float64 ``[N]`` each."""
    generator = np.random.default_rng(seed)
    held_out_N = generator.normal(0.3, 0.2, count)
    return held_out_N + generator.normal(0.4, 0.2, count), held_out_N


# ------------------------------------------------------------------------------------------------------ the statistics


def test_statistics_are_those_of_scipy_and_of_plain_loops():
    reward_N, held_out_N = (row_N.round(1) for row_N in scores())  # with ties
    assert agreement.rank_correlation(reward_N, held_out_N) == pytest.approx(stats.spearmanr(reward_N, held_out_N)[0], abs=1e-6)
    missing_N = np.where(np.arange(N) == 3, math.nan, reward_N)
    without = [np.delete(row_N, 3) for row_N in (reward_N, held_out_N)]
    assert agreement.rank_correlation(missing_N, held_out_N) == pytest.approx(stats.spearmanr(*without)[0], abs=1e-6)
    assert agreement.rank_correlation(np.ones(N), held_out_N) == 0
    below = [sum((a < b) + (a == b) / 2 for a in reward_N) / N for b in reward_N]
    assert agreement.shares_below(reward_N) == pytest.approx(below)
    assert agreement.errors_above_zero(reward_N) == pytest.approx(stats.ttest_1samp(reward_N, 0).statistic)
    assert agreement.errors_above_zero(np.full(N, -2.0)) == -math.inf
    assert agreement.errors_above_zero(np.zeros(N)) == 0


def test_by_chance_the_rule_holds_as_rarely_as_it_says():
    """At the boundary of each rule, where it is most often wrong: one in 741, here of 10 000."""
    generator, draws = np.random.default_rng(0), 10_000
    boundaries = {"risen": (agreement.RISE, 0), "left_behind": (8, 8 * agreement.SHARE), "turned": (8, -agreement.FALL)}
    seen = dict.fromkeys(boundaries, 0)
    for noise_N, other_N in generator.normal(0, 1, (draws, 2, N)):
        for rule, (reward, held_out) in boundaries.items():
            seen[rule] += getattr(agreement.Change(reward + noise_N, held_out + other_N), rule)
    assert all(draws / 741 / 2 < count < 3 * draws / 741 for count in seen.values()), seen


# ------------------------------------------------------------------------------------------------------------ the alarm


class Course:
    """A run that a test tells: the reward and the held-out score of every image, validation by validation."""

    def __init__(self, callback, folder=None, rows=None):
        self.callback, self.rows, self.logged, self.clip = callback, rows, [], 0.5
        weights = {"unused": 0.0, "clip": 1.0, "words": 0.5}
        self.module = SimpleNamespace(reward=SimpleNamespace(weights=weights), log_dict=self.logged.append)
        self.trainer = SimpleNamespace(global_step=0, loggers=[], is_global_zero=rank() == 0, log_dir=folder, fast_dev_run=False)
        self.module.unified_score = SimpleNamespace(held_out=("judge",))
        callback.setup(self.trainer, self.module, "fit")

    def validate(self, reward_N, held_out_N):
        """One validation, in batches of 16 at most. Of the reward, the clip is ``self.clip``, the words the rest."""
        self.callback.on_validation_start(self.trainer, self.module)
        for batch in self.rows or np.array_split(np.arange(len(reward_N)), math.ceil(len(reward_N) / 16)):
            reward_B, held_out_B = (torch.from_numpy(row_N[batch]).float() for row_N in (reward_N, held_out_N))
            outputs = {
                "id": torch.from_numpy(np.asarray(batch)), "caption": [f"caption {one}" for one in batch],
                "image": torch.stack([torch.full((3, 8, 8), one / 100) for one in batch]),
                "reconstruction": torch.stack([torch.full((3, 8, 8), 1 - one / 100) for one in batch]),
                "reward": reward_B, "reward/clip": torch.full_like(reward_B, self.clip), "reward/words": 2 * (reward_B - self.clip),
                "reward/unused": torch.full_like(reward_B, math.nan), "held_out": held_out_B,
            }  # fmt: skip
            names = {"name": [f"{one}.png" for one in batch]}
            self.callback.on_validation_batch_end(self.trainer, self.module, outputs, names, 0)
        self.callback.on_validation_epoch_end(self.trainer, self.module)
        self.trainer.global_step += 25


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def heard(callback, *rises, resumed=False):
    """What is said in a run whose rewards and held-out scores rise by so much since the start, at each validation."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        course = Course(callback)
        reward_N, held_out_N = scores()
        noise_KN = np.random.default_rng(1).normal(0, 0.05, (len(rises), N))
        for (reward, held_out), noise_N in zip(rises, noise_KN, strict=True):
            course.validate(reward_N + reward + noise_N, held_out_N + held_out + noise_N)
            if resumed:
                callback.load_state_dict(saved_and_read(callback.state_dict()))
    return [str(one.message) for one in caught], course.logged


def saved_and_read(state):
    """A state as a checkpoint gives it back, read without code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


GAMED = "the reward is being gamed: since step "


@pytest.mark.parametrize("resumed", [False, True], ids=["in one go", "resumed after every validation"])
@pytest.mark.parametrize(
    ("rises", "steps", "since"),
    [
        ([(0, 0), (0.3, 0.3), (0.5, 0.6), (0.6, 0.6)], [], []),  # both rise
        ([(0, 0), (0, -0.2), (-0.1, -0.3)], [], []),  # both fall
        ([(0, 0), (0.03, 0), (-0.03, 0)], [], []),  # no rise to speak of
        ([(0, 0), (0.5, 0.0), (0.6, 0.0)], [25], [0]),  # only the reward rises: told once
        ([(0, 0), (0.4, -0.1)], [25], [0]),  # the held-out score falls from the start
        ([(0, 0), (0.4, 0.4), (0.6, 0.3), (0.7, 0.1)], [50], [25]),  # past the best: the start is still surpassed
        ([(0, 0), (0.5, 0.0), (0.5, 0.5), (1.5, 0.0)], [25, 75], [0, 50]),  # healed, and sick again
    ],
)
def test_it_is_told_once_when_only_the_reward_rises(rises, steps, since, resumed):
    told, logged = heard(RewardHacking(), *rises, resumed=resumed)
    assert len(told) == len(steps)
    for line, step, earlier in zip(told, steps, since, strict=True):
        assert line.startswith(f"step {step}: {GAMED}{earlier} it rose by ")
        assert "look at hacking.png: " in line
        assert line.count(".png (") == 3  # examples by name and caption
        assert line.count("('caption ") == 3
        assert "model.init_args.reward.init_args.weights.words, where it rose most" in line
    assert [25 * number for number, one in enumerate(logged) if one["hacking/alarm"]][:1] == steps[:1]


def test_the_numbers_of_a_validation():
    _, (first, second) = heard(RewardHacking(), (0, 0), (0.5, 0.1))
    reward_N, held_out_N = scores()
    noise_KN = np.random.default_rng(1).normal(0, 0.05, (2, N))
    then = (reward_N + noise_KN[0], held_out_N + noise_KN[0])
    now = (reward_N + 0.5 + noise_KN[1], held_out_N + 0.1 + noise_KN[1])
    expected = stats.spearmanr(*now)[0]
    assert second["hacking/rank_correlation/reward"] == pytest.approx(expected, abs=1e-5)
    assert second["hacking/rank_correlation/words"] == pytest.approx(expected, abs=1e-5)
    assert second["hacking/rank_correlation/clip"] == second["hacking/rank_correlation/unused"] == 0
    for tag, new_N, old_N in (("reward", now[0], then[0]), ("held_out", now[1], then[1])):
        assert first[f"hacking/rise/{tag}"] == 0
        assert second[f"hacking/rise/{tag}"] == pytest.approx((new_N.mean() - old_N.mean()) / old_N.std(), abs=1e-5)
    expected = stats.spearmanr(now[0] - then[0], now[1] - then[1])[0]
    assert second["hacking/improvement_correlation"] == pytest.approx(expected, abs=0.02)  # float32 makes ties
    assert first["hacking/improvement_correlation"] == 0


def test_rises_since_the_best_are_in_spreads_of_the_first():
    course, (reward_N, held_out_N) = Course(RewardHacking()), scores()
    course.validate(reward_N, held_out_N)
    course.clip = 5.0  # rose most since the start, but no more since the best
    course.validate(2 * reward_N, 2 * held_out_N)  # the best, with twice the spread
    with pytest.warns(UserWarning, match=GAMED) as told:
        course.validate(2 * reward_N + 0.3, 2 * held_out_N - 0.1)
    rise, fall = 0.3 / reward_N.std(), -0.1 / held_out_N.std()
    seen = f"since step 25 it rose by {rise:.2f} spreads, but the held-out score by {fall:.2f} (mean of {N} images;"
    assert seen in str(told[0].message)
    assert "weights.words, where it rose most" in str(told[0].message)


def test_the_panel_has_the_worst_disagreement_first(tmp_path):
    reward_N, held_out_N = np.arange(10.0), np.arange(10.0)
    held_out_N[[3, 7]] = held_out_N[[7, 3]]  # the reward of 7 ranks four places above its held-out score
    Course(RewardHacking(2), tmp_path).validate(reward_N, held_out_N)
    with Image.open(tmp_path / "hacking.png") as picture:
        shown = pil_to_tensor(picture)
    assert shown.shape[2] == 2 * (TILE + GAP)
    height = shown.shape[1] // 2
    for row, image in enumerate((7, 0)):  # all others agree equally, so the first of them
        corners = shown[0, row * height, [0, TILE + GAP]] / 255
        assert corners.tolist() == pytest.approx([image / 100, 1 - image / 100], abs=0.01)


def test_images_without_a_reward_and_without_pictures_do_no_harm(tmp_path):
    reward_N, held_out_N = scores(count=KEPT + 40)
    reward_N[5] = math.nan
    reward_N[-1], held_out_N[-1] = 9, -1  # the worst of all has no picture
    course = Course(RewardHacking(), tmp_path)
    course.validate(reward_N, held_out_N)
    assert len(course.callback.first.ids) == KEPT + 39
    assert course.callback.first.scores["held_out"].min() == -1
    assert (tmp_path / "hacking.png").exists()


def test_other_images_are_another_start():
    course = Course(RewardHacking())
    course.validate(*scores())
    course.rows = [range(N, N + 9)]
    course.validate(*(row_N + 1 for row_N in scores(count=N + 9)))
    assert course.callback.first.ids == course.callback.best.ids == list(range(N, N + 9))
    assert course.logged[1]["hacking/rise/reward"] == 0


def test_nothing_to_compare_is_said_in_one_line(build, trainer):
    callback = RewardHacking()
    run = trainer(callbacks=[callback], limit_val_batches=1, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=r"does nothing: .*; name some .* in model\.init_args\.unified_score\.init_args\.held_out"):
        run.fit(build(), SceneData(batch_size=2, train_size=4, val_size=2))
    assert callback.first is None
    assert not [tag for tag in run.callback_metrics if tag.startswith("hacking/")]


def test_no_images_are_refused():
    with pytest.raises(ValueError, match=r"images=0 of callbacks\.hacking\.RewardHacking; allowed: 1 or more"):
        RewardHacking(0)


# ------------------------------------------------------------------------------------------------------------- the run


SHARES = [[range(0, 16), range(16, 32)], [range(32, 48), [*range(48, 64), 0, 1]]]  # two images come twice


def course_of(rank, folder, shares):
    """What a process logs and keeps in two validations, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        course = Course(RewardHacking(), folder, [list(rows) for rows in shares[rank]])
        reward_N, held_out_N = scores()
        course.validate(reward_N, held_out_N)
        course.validate(reward_N + 0.5, held_out_N - 0.1)
    state = course.callback.state_dict()["first"]
    return course.logged, state["ids"], [str(one.message) for one in caught]


@pytest.mark.slow
def test_two_processes_have_the_numbers_and_the_picture_of_one(tmp_path):
    (logged, ids, told), other = run_on_two(course_of, str(tmp_path / "two"), SHARES)
    alone = course_of(0, str(tmp_path / "one"), [SHARES[0] + SHARES[1]])
    assert (logged, ids, told) == alone
    assert other[:2] == alone[:2]
    assert ids == list(range(N))
    assert len(told) == 1
    assert (tmp_path / "two/hacking.png").read_bytes() == (tmp_path / "one/hacking.png").read_bytes()


class Counted(LayoutEncoder):
    calls = 0

    def embed(self, images):
        self.calls += 1
        return super().embed(images)


def test_a_resumed_run_keeps_its_first_validation_and_nothing_is_embedded_twice(build, trainer, tmp_path):
    def fit(steps, *callbacks):
        judge = Counted(2)
        run = trainer(
            callbacks=[*callbacks, RolloutCheckpoint(1, save_last="link")], enable_checkpointing=True, plugins=[CheckpointFiles()],
            default_root_dir=tmp_path / str(len(callbacks)), max_steps=steps, limit_val_batches=2, num_sanity_val_steps=-1,
            val_check_interval=1, check_val_every_n_epoch=None,
        )  # fmt: skip
        module = build(unified_score=UnifiedScore({"judge": judge}, held_out=("judge",), bootstrap=0))
        run.fit(module, SceneData(batch_size=2, train_size=8, val_size=4, eval_batch_size=2), ckpt_path="last")
        return run.callback_metrics, judge.calls

    first, second = RewardHacking(), RewardHacking()
    metrics, calls = fit(1, first)
    assert calls == fit(1)[1]
    assert {"hacking/rank_correlation/layout", "hacking/rise/held_out", "hacking/alarm"} <= set(metrics)
    fit(2, second)
    assert (first.first.step, second.first.step) == (0, 0)
    assert second.first.ids == first.first.ids
    for tag, row_N in first.first.scores.items():
        assert np.array_equal(second.first.scores[tag], row_N)
    assert not np.array_equal(second.best.scores["reward"], np.zeros(4))


def test_a_run_of_the_command_line_logs_and_draws(run, events):
    assert [image.step for image in events.Images("hacking/disagreement")] == [0, 3, 4]
    for tag in ("rank_correlation/reward", "rank_correlation/layout", "rise/reward", "rise/held_out", "alarm"):
        assert len(events.Scalars(f"hacking/{tag}")) == 3
        assert f"hacking/{tag}" in run.summary["before"]
    assert (run.folder / "hacking.png").stat().st_size > 0


def test_the_control_that_is_cheated_counts_words():
    reward = CaptionLength(4)
    images = torch.zeros(2, 3, 8, 8)
    assert reward(images, torch.zeros(4, 3, 8, 8), ["", "a", "a b  c", "a b c d e"]).tolist() == [[0, 0.25], [0.75, 1]]
    with pytest.raises(ValueError, match="words=0"):
        CaptionLength(0)
