"""What loading a checkpoint changes: the state of optimizer and schedule, and none of their settings."""

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW
from torch.optim import lr_scheduler as schedules

from uae.checkpoints.resuming import differences, resumable


def prepared(kind=AdamW, schedule=None, **settings):
    """A weight, its optimizer and its schedule, ready to be resumed."""
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = kind([{"params": [weight]}], **settings)
    resumable(optimizer, None if schedule is None else (schedule := schedule(optimizer)))
    return optimizer, schedule


def run(optimizer, schedule, steps):
    """Learning rates that the steps had."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        weight = optimizer.param_groups[0]["params"][0]
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return rates


def resumed(written, read):
    """The second pair goes on from the state of the first."""
    read[0].load_state_dict(written[0].state_dict())
    if read[1] is not None:
        read[1].load_state_dict(written[1].state_dict() if written[1] else {"last_epoch": 4})
    return read


def test_moments_are_loaded_and_settings_are_not():
    written, read = prepared(lr=0.1, betas=(0.9, 0.95)), prepared(lr=1e-9, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.7)
    run(*written, steps=4)
    configured = {name: value for name, value in read[0].param_groups[0].items() if name != "params"}
    resumed(written, read)
    (group,) = read[0].param_groups
    assert {name: value for name, value in group.items() if name != "params"} == configured
    (mine,), (theirs,) = read[0].state.values(), written[0].state.values()
    assert all(torch.equal(mine[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert mine["step"] == 4


def linear(optimizer):
    return schedules.LinearLR(optimizer, 0.1, total_iters=10)


SCHEDULES = {
    "lambda": lambda optimizer: schedules.LambdaLR(optimizer, lambda step: (step + 1) / 10),
    "recursive": lambda optimizer: schedules.CosineAnnealingLR(optimizer, T_max=11),
    "warmup, then decay": lambda optimizer: schedules.SequentialLR(
        optimizer, [linear(optimizer), schedules.ExponentialLR(optimizer, 0.9)], [6]
    ),
    "one cycle": lambda optimizer: schedules.OneCycleLR(optimizer, max_lr=0.2, total_steps=20),
}


@pytest.mark.parametrize("before", [*SCHEDULES, None])
@pytest.mark.parametrize("after", [*SCHEDULES, None])
def test_a_schedule_has_the_configurations_shape_and_the_checkpoints_position(before, after):
    written, read = prepared(lr=0.1, schedule=SCHEDULES.get(before)), prepared(lr=0.3, schedule=SCHEDULES.get(after))
    straight = prepared(lr=0.3, schedule=SCHEDULES.get(after))
    run(*written, steps=4)
    expected = run(*straight, steps=8)
    assert run(*resumed(written, read), steps=4) == expected[4:]


def test_another_length_of_the_same_schedule_is_in_force():
    short, long = (lambda optimizer, n=n: schedules.LinearLR(optimizer, 0.1, total_iters=n) for n in (5, 50))
    written, read, straight = (prepared(lr=0.1, schedule=schedule) for schedule in (short, long, long))
    run(*written, steps=4)
    assert run(*resumed(written, read), steps=3) == run(*straight, steps=7)[4:]


def test_a_schedule_that_ends_before_the_checkpoint_names_the_key():
    written, read = (prepared(lr=0.1, schedule=lambda o, n=n: schedules.OneCycleLR(o, 0.2, total_steps=n)) for n in (20, 3))
    run(*written, steps=6)
    with pytest.raises(ValueError, match=r"model\.init_args\.scheduler ends before step 6, where the checkpoint is"):
        resumed(written, read)


OTHERS = [
    (AdamW, {}, SGD, {"lr": 0.1}, "SGD (its state of a weight: nothing)"),
    (SGD, {"lr": 0.1, "momentum": 0.9}, AdamW, {}, "AdamW (its state of a weight: exp_avg, exp_avg_sq, step)"),
    (AdamW, {}, Adagrad, {}, "Adagrad (its state of a weight: step, sum)"),
    (AdamW, {}, AdamW, {"amsgrad": True}, "max_exp_avg_sq, step), but the checkpoint is that of another optimizer (exp_avg, exp_"),
]


@pytest.mark.parametrize(("before", "old", "after", "new", "said"), OTHERS, ids=["sgd", "from sgd", "adagrad", "amsgrad"])
def test_moments_of_another_optimizer_are_refused(before, old, after, new, said):
    written, read = prepared(before, **old), prepared(after, **new)
    run(*written, steps=1)
    with pytest.raises(ValueError, match=r"model\.init_args\.optimizer") as caught:
        resumed(written, read)
    assert said in str(caught.value)


def test_optimizers_with_the_same_moments_and_runs_without_any_go_on():
    written, read = prepared(AdamW), prepared(Adam, lr=0.2, weight_decay=0.1)
    read[0].load_state_dict(written[0].state_dict())  # no update was made
    run(*written, steps=1)
    resumed(written, read)
    assert read[0].param_groups[0]["decoupled_weight_decay"] is False  # Adam's, not AdamW's
    run(*read, steps=1)


def test_what_differs_is_told_once():
    before = {"seed": "0", "run_name": "a", "model.o.class_path": "Adam", "model.o.init_args.lr": "1", "model.s": "None", "x": "1"}
    now = {"seed": "1", "run_name": "b", "model.o.class_path": "SGD", "model.o.init_args.lr": "2", "model.s.class_path": "S", "x": "1"}
    assert differences(before, now) == ["model.o.class_path: Adam -> SGD", "model.s.class_path: None -> S", "seed: 0 -> 1"]
    assert differences({}, now) == differences(before, {}) == []
