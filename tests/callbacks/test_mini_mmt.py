import pytest

from uae.miniature.metrics.mini_mmt import SUBTASKS, likelihood, mini_mmt


@pytest.mark.parametrize(("subcommand", "split"), [("validate", "val"), ("test", "test")])
def test_understanding_is_scored_on_scenes_of_its_split(command, subcommand, split):
    extra = ["--trainer.callbacks+=uae.miniature.callbacks.mini_mmt.MiniMMT", "--trainer.callbacks.questions=8", f"--run_name={split}"]
    cli = command(subcommand, *extra)
    logged = {name: float(value) for name, value in cli.trainer.callback_metrics.items() if name.startswith("understanding/")}
    found = mini_mmt(likelihood(cli.model.umm.captioner), 8, split=split)
    assert logged == pytest.approx({f"understanding/{name}": one.value for name, one in found.items()}, abs=1e-6)
    assert set(found) == {*SUBTASKS, "small_object", "overall"}
