"""What trains is float32, whatever is asked: steps of 1e-5 do not exist in 16 bits."""

import pytest
import torch

from tests.conftest import data
from uae.models.finetune import Full, LoRA


class InBFloat16:
    """A system whose captioner has bfloat16 weights, as real ones are loaded."""

    def __init__(self, system):
        self.system = system

    def build(self):
        umm = self.system.build()
        umm.captioner.learner.network.to(torch.bfloat16)
        return umm


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_that_convert_the_weights_are_one_line(build, trainer, precision, stage):
    run = getattr(trainer(precision=precision, limit_val_batches=1), stage)
    with pytest.raises(ValueError, match=rf"trainer\.precision={precision} .*; allowed: 32-true, bf16-mixed, 16-mixed"):
        run(build(finetune=LoRA(rank=2)), data())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_that_train_in_bfloat16_are_one_line(build, trainer, system, precision):
    module = build(system=InBFloat16(system), finetune=Full(), ratio_tolerance=1.0)
    with pytest.raises(ValueError, match=r"reading\.dtype=bfloat16, but .*; allowed: model.*reading\.dtype=float32"):
        trainer(precision=precision).fit(module, data())
    trainer(limit_val_batches=1).validate(module, data())  # nothing is rounded away where nothing trains


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_adapter_on_bfloat16_weights_keeps_steps_of_a_hundred_thousandth(build, trainer, system, precision):
    def fitted(lr):
        adam = lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)  # noqa: E731
        module = build(system=InBFloat16(system), finetune=LoRA(rank=2), ratio_tolerance=1.0, optimizer=adam)
        trainer(max_steps=4, precision=precision).fit(module, data(batch_size=2))
        return {name: parameter.detach() for name, parameter in module.named_parameters() if "lora_A" in name}

    still, moved = fitted(0.0), fitted(1e-5)
    share = [(moved[name] != still[name]).float().mean() for name in still]
    assert {parameter.dtype for parameter in moved.values()} == {torch.float32}
    assert torch.stack(share).mean() > 0.9
