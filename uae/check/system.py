"""All checks of one system, in order, from a module that is not built yet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from uae.check.memory import weights_as_planned
from uae.check.parts.captioners import Captions
from uae.check.parts.image_policies import PictureActions
from uae.check.parts.renderers import Pictures
from uae.check.parts.rewards import Scores
from uae.check.parts.verdicts import Check, Found, Precision, at_most, not_applicable
from uae.check.parts.weights import precision_of
from uae.check.training import Training, resumed
from uae.module import UnifiedGRPO
from uae.policies import learners
from uae.rollout import Plan
from uae.types import ImageBatch

IMAGES, GROUP, TOKENS, RECONSTRUCTIONS = 2, 3, 24, 2  # sizes of the rollouts; a smaller number of the configuration holds
AUTOCAST = {"bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16, "16-mixed": torch.float16, "16": torch.float16}
Show = Callable[[str, Found | None], None]  # a check's name, and what it found; None before it runs


def check(
    module: UnifiedGRPO, data: Any, trainer: Mapping[str, Any] | None = None, show: Show = lambda name, found: None
) -> dict[str, Found]:
    """Check a system, its reward and its training.

    Args:
        module: The module of the run. It must not be built yet, as it is built twice.
        data: The data module of the run, from which the first training images are taken.
        trainer: The settings of ``trainer`` in the configuration. ``precision`` and what the memory plan reads are used.
        show: Called with the name of every check before it runs, and again with what it found.

    Returns:
        What every check found, by its name. A check that raises an error has failed, and its reason is the error.
    """
    found: dict[str, Found] = {}
    with torch.random.fork_rng(devices=[]):
        for one in Checked(module, data, trainer or {}).checks():
            show(one.name, None)
            found[one.name] = measured(one)
            show(one.name, found[one.name])
    return found


def measured(one: Check) -> Found:
    """Run a check. An error is a failure, in one line."""
    try:
        return one.measure()
    except Exception as error:  # noqa: BLE001  whatever a part under test raises
        return at_most(float("nan"), 0, f"{type(error).__name__}: {' '.join(str(error).split())}")


@dataclass
class Checked:
    """A module under test.

    Args:
        unbuilt: The module, before ``configure_model``.
        data: The data module of the run.
        trainer: The settings of ``trainer`` in the configuration.
    """

    unbuilt: UnifiedGRPO
    data: Any
    trainer: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Build and place the module, and take the first images."""
        self.module = self.placed(copy.deepcopy(self.unbuilt))
        first: ImageBatch = next(iter(self.data.train_dataloader()))
        images_BCHW, id_B = first["image"][:IMAGES], first["id"][:IMAGES]
        self.batch: ImageBatch = {"image": images_BCHW.to(self.module.device), "id": id_B.to(self.module.device)}
        with self.computing():
            self.reading, self.drawing = precision_of(self.module.umm.captioner), precision_of(self.module.umm)

    def placed(self, module: UnifiedGRPO) -> UnifiedGRPO:
        """The module, built and moved to where a run would have it."""
        module.configure_model()
        module.to("cuda" if torch.cuda.is_available() and self.trainer.get("accelerator") != "cpu" else "cpu")
        module.on_fit_start()
        return module

    def computing(self, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
        """Inside, passes are cast as in the run; or to another data type."""
        dtype = dtype or AUTOCAST.get(str(self.trainer.get("precision")))
        return nullcontext() if dtype is None else torch.autocast(self.module.device.type, dtype)

    @cached_property
    def plan(self) -> Plan:
        """The run's settings of a rollout, with fewer and shorter captions."""
        of_run = self.module.plan
        sampling = replace(of_run.sampling, max_tokens=min(TOKENS, of_run.sampling.max_tokens))
        made = min(RECONSTRUCTIONS, of_run.reconstructions)
        return replace(of_run, group=GROUP, sampling=sampling, mini_batches=1, reconstructions=made)

    def pictures(self, module: UnifiedGRPO) -> tuple[Captions, Pictures, PictureActions | None]:
        """What is asked of a module's captioner, of its renderer, and of that renderer as a policy if it is one."""
        asked = module.umm.captioner, self.batch["image"], GROUP, self.plan.sampling, self.reading, self.plan.instruction
        captions, policy = Captions(*asked), module.umm.image_policy
        pictures = Pictures(module.umm, captions, self.drawing)
        return captions, pictures, None if policy is None else PictureActions(policy, pictures, self.drawing)

    def checks(self) -> Iterator[Check]:
        """All checks. What one needs of another is there when its turn comes."""
        for one in self._of_parts():
            yield one._replace(measure=self._as_in_the_run(one))
        of_actions = self.reading if self.plan.train == "captions" else self.drawing
        training = Training(self.module, self.batch, self.plan, of_actions)
        for one in training.checks():
            yield one._replace(measure=self._as_in_the_run(one))
        yield Check("plan: weights", lambda: weights_as_planned(self.module, self.data, self.trainer))
        yield Check("training: resumes", lambda: self.resumes(training))
        yield from self.in_other_precision()

    def _as_in_the_run(self, one: Check) -> Callable[[], Found]:
        def measure() -> Found:
            with self.computing():
                return one.measure()

        return measure

    def _of_parts(self) -> Iterator[Check]:
        captions, pictures, actions = self.pictures(self.module)
        yield Check(f"captions: ratio, {self.reading.name}", captions.ratio)
        yield from captions.checks()
        yield from pictures.checks()
        if actions is None:
            yield Check("picture actions: ratio", lambda: not_applicable("the renderer's actions have no log-probs"))
        else:
            yield Check(f"picture actions: ratio, {self.drawing.name}", actions.ratio)
            yield from actions.checks()
        for name, part in self.module.reward.parts.items():
            yield from Scores(name, part, self.batch["image"], pictures, precision_of(part)).checks()

    def resumes(self, training: Training) -> Found:
        """Save the state, build the module anew in place of the one that was trained, and compare the next rollout."""
        with self.computing():
            state, expected = training.saved()
        vars(training).clear()  # with the module, so that its weights and those of the other are not in memory at once
        self.module = self.placed(self.unbuilt)
        with self.computing():
            return resumed(self.module, state, self.batch, self.plan, expected)

    def in_other_precision(self) -> Iterator[Check]:
        """The ratio again, in float32 if the run computes in 16 bits, else in bfloat16."""
        captions, _, actions = self.pictures(self.module)
        for what, asked in (("captions", captions), ("picture actions", actions)):
            if asked is not None:
                other = Precision(not asked.precision.exact)
                yield Check(f"{what}: ratio, {other.name}", partial(self._ratio_in, other, asked))

    def _ratio_in(self, other: Precision, asked: Captions | PictureActions) -> Found:
        if not other.exact:
            with self.computing(torch.bfloat16):
                return asked.ratio(other)
        for learner in learners(self.module.umm, "both").values():
            learner.network.float()
        return asked.ratio(other)
