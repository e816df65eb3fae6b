"""The command line: ``python -m uae.cli {fit,validate,test,predict} --config FILE [--config FILE ...] [--key value ...]``.

The first ``--config`` is a complete run. Further files and options override parts of it, the later the stronger.
Hyper-parameters stored in a checkpoint never override the configuration. Runs write to ``outputs/<run_name>``.

``UAE_DEBUG=1`` shows tracebacks and the parser's full reports.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse.typing import NonNegativeFloat
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO

import uae.strategy  # noqa: F401  registers "fsdp2"
from uae.checkpoints.files import CheckpointFiles
from uae.cli.callbacks_package import share_callbacks
from uae.cli.config_file import check_config_file
from uae.cli.errors import OUTPUTS, debugging, fail, in_one_line, interrupted, one_line_errors
from uae.cli.event_log import EnduringTensorBoard
from uae.cli.explain import explain
from uae.cli.values import check_values
from uae.types import PlannedSystem

GIB = 2**30


class Parser(LightningArgumentParser):
    """A parser in which typos are errors of one line, and interpolations see the merged configuration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("parser_mode", "omegaconf+")  # "omegaconf" would resolve each file on its own
        kwargs.setdefault("allow_abbrev", False)  # else --trainer.max_step would silently be read as max_steps
        super().__init__(*args, **kwargs)

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a file that can be one."""
        check_config_file(cfg_path)
        return super().parse_path(cfg_path, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and an error of one line."""
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        fail(explain(message, self._keys()))

    def _keys(self) -> Iterator[str]:
        for action in self._actions:
            yield action.dest
            if isinstance(action.choices, dict):
                yield from (inner.dest for parser in action.choices.values() for inner in parser._actions)


class CLI(LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule that a configuration names by ``class_path``.

    Args:
        args: Command-line arguments; None reads them from ``sys.argv``.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        share_callbacks()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # Lightning would build them before LoRA freezes weights
            save_config_kwargs={"overwrite": True},  # a resumed run writes to the same folder again
            trainer_defaults={
                "num_sanity_val_steps": -1,  # a whole validation at step 0, which the summary compares with
                "inference_mode": False,  # tensors of inference mode could not enter a later backward pass
                "use_distributed_sampler": False,  # the data modules split the data themselves
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run_name``, ``--print_plan`` and ``--memory_gib``."""
        parser.add_argument("--run_name", type=str, default="run", help=f"Results go to {OUTPUTS}/<run_name>.")
        parser.add_argument(
            "--print_plan", action="store_true", help="Print the memory that fit needs on a GPU, part by part, and stop."
        )
        parser.add_argument(
            "--memory_gib",
            type=NonNegativeFloat | None,
            default=None,
            help="Memory per GPU in GiB. If the plan of fit needs more, fit stops at once; null is the GPU's own, 0 never stops.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, and refuse values that types let pass."""
        super().parse_arguments(parser, args)
        check_values(self.config[self.config["subcommand"]])

    def _parse_ckpt_path(self) -> None:
        """Do nothing. Lightning would let hyper-parameters in the checkpoint override the configuration."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with TensorBoard in ``outputs/<run_name>`` unless the configuration names a logger.

        The logger is not a default of the parser, so that the saved ``config.yaml`` can be run again under another name.
        Only ``fit`` writes to the folder itself; other subcommands write below it and do not overwrite the events of ``fit``.
        """
        name = self._get(self.config_init, "run_name")
        trainer = self._get(self.config_init, "trainer")
        self._plan_memory(trainer)
        if trainer.get("logger") in (None, True):
            kwargs["logger"] = EnduringTensorBoard(
                OUTPUTS, name, version="" if self.subcommand == "fit" else self.subcommand
            )
        if trainer.get("default_root_dir") is None:
            kwargs["default_root_dir"] = str(Path(OUTPUTS, name))
        made = super().instantiate_trainer(**kwargs)
        for callback in made.checkpoint_callbacks:  # else a logger with a new folder per start would hide them from "last"
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(Path(made.default_root_dir, "checkpoints"))
        if type(made.strategy.checkpoint_io) is TorchCheckpointIO:  # the default, so the configuration names none
            made.strategy.checkpoint_io = CheckpointFiles()
        return made

    def _plan_memory(self, trainer: Mapping[str, Any]) -> None:
        """Print the plan and stop, or stop a run that cannot fit. Called before the trainer takes the GPUs."""
        asked, available = self._get(self.config_init, "print_plan"), self._get(self.config_init, "memory_gib")
        if self.subcommand != "fit":
            if asked:
                fail(f"--print_plan is the plan of fit, not of {self.subcommand}: use fit --print_plan")
            return
        if available is None and trainer.get("accelerator") != "cpu" and torch.cuda.is_available():
            available = torch.cuda.get_device_properties(0).total_memory / GIB
        if asked:
            from uae.memory import plan

            memory = plan(self.model, self.datamodule, trainer)
            print(memory.table(available * GIB if available else None))
            raise SystemExit(0)
        if available and isinstance(getattr(self.model, "system", None), PlannedSystem):
            self._check_memory(trainer, available)

    def _check_memory(self, trainer: Mapping[str, Any], available: float) -> None:
        """Stop a run that needs more than ``available`` GiB. A run that cannot be planned continues with a warning."""
        from uae.memory import plan

        try:
            problem = plan(self.model, self.datamodule, trainer).problem(available * GIB)
        except Exception as error:
            warnings.warn(f"no memory plan, so nothing is checked: {in_one_line(str(error))}", stacklevel=2)
            return
        if problem is not None:
            fail(f"{problem}; --print_plan shows all of it, --memory_gib 0 starts anyway")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict" and kwargs.get("return_predictions") is None:
            kwargs["return_predictions"] = False  # a callback writes them; keeping all of them would fill the memory
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:  # Lightning has shut down and asks for status 1
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            interrupted(f"interrupted at step {self.trainer.global_step}" if self.trainer.is_global_zero else "")


def main(args: list[str] | None = None) -> CLI:
    """Run the command line.

    Args:
        args: Command-line arguments; None reads them from ``sys.argv``.
    """
    with one_line_errors():
        return CLI(args)

