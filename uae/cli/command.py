"""The command line: ``python -m uae.cli {fit,validate,test,predict} --config FILE [--config FILE ...] [--key value ...]``.

The first ``--config`` is a complete run. Further files and options override parts of it, the later the stronger. A file that does
not exist may be one of the package, see `uae.files.packaged`.
Hyper-parameters stored in a checkpoint never override the configuration. Runs write to ``outputs/<run_name>``, see
`uae.cli.run_folder`.

``fit`` trains in stages with ``--stage "FILE OPTIONS"``, once for each, see `uae.cli.stages`.

``UAE_DEBUG=1`` shows tracebacks and the parser's full reports.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse.typing import NonNegativeFloat
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO

import uae.strategy  # noqa: F401  registers "fsdp2"
from uae import __version__
from uae.checkpoints.files import CheckpointFiles
from uae.cli.callbacks_package import share_callbacks
from uae.cli.config_file import check_config_file
from uae.cli.errors import OUTPUTS, debugging, fail, in_one_line, interrupted, one_line_errors
from uae.cli.event_log import EnduringTensorBoard
from uae.cli.explain import explain
from uae.cli.run_folder import Labels, Runs, below, give_back, lock
from uae.cli.stages import OPTION, asks_for_stages, say_ending, train_in_stages
from uae.cli.values import check_accelerator, check_values
from uae.console.start import with_console
from uae.files.packaged import configurations_named
from uae.files.settings import make_parser_strict, nulls_kept
from uae.loggers import FollowsRun
from uae.trainer import is_dry_run
from uae.types import PlannedSystem

GIB = 2**30
make_parser_strict("omegaconf+")


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

    def parse_args(self, args: Any = None, namespace: Any = None, **named: Any) -> Any:  # type: ignore[override]  # it has overloads
        """Parse a command line, in which ``null`` means null for every key, and configurations of the package have names."""
        words = configurations_named(list(sys.argv[1:] if args is None else args))
        return super().parse_args(nulls_kept(words), namespace, **named)

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


class RunTrainer(Trainer):
    """Lightning's Trainer, all of whose files go to one folder, whatever logs."""

    results: Path | None = None  # the folder of this run or evaluation; None is Lightning's choice

    @property
    def log_dir(self) -> str | None:
        """The folder of this run or evaluation. All processes must ask for it, as they learn it from the first."""
        if self.results is None:
            return super().log_dir
        folder: str = self.strategy.broadcast(str(self.results))
        return folder


class CLI(LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule that a configuration names by ``class_path``.

    Args:
        args: Command-line arguments; None reads them from ``sys.argv``.
    """

    trainer: RunTrainer

    def __init__(self, args: list[str] | None = None) -> None:
        self._words = sys.argv[1:] if args is None else args
        share_callbacks()
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=RunTrainer,
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

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser of the command or of a subcommand. Those of classes have no ``--version``, which may be an argument of theirs."""
        parser = super().init_parser(**kwargs)
        parser.add_argument("--version", action="version", version=f"uae {__version__}", help="Print the version and stop.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run_name``, ``--label``, ``--stage``, ``--print_plan``, ``--memory_gib`` and ``--check_first_rollout``."""
        parser.add_argument(
            "--run_name",
            type=str,
            default="run",
            help=f"Results go to {OUTPUTS}/<run_name>, or to <run_name>-2, -3, ... if other runs are there. "
            f"--trainer.default_root_dir replaces {OUTPUTS}.",
        )
        parser.add_argument("--label", type=Labels, default=Labels(), help="What TensorBoard shows behind the run's name.")
        parser.add_argument(
            OPTION,
            type=str | None,
            default=None,
            help="Of fit: a stage of training, as configuration files and then options that hold in this stage only, all in one "
            "pair of quotes. Given several times, the stages are trained one after the other.",
        )
        parser.add_argument(
            "--print_plan",
            action="store_true",
            help="Print the memory that fit needs on a GPU, part by part, and the least time of its stages, and stop.",
        )
        parser.add_argument(
            "--memory_gib",
            type=NonNegativeFloat | None,
            default=None,
            help="Memory per GPU in GiB. If the plan of fit needs more, fit stops at once; null is the GPU's own, 0 never stops.",
        )
        parser.add_argument(
            "--check_first_rollout",
            type=bool,
            default=True,
            help="Whether fit looks at one row of a new run's first rollout again; python -m uae.check looks at everything.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, and refuse values that types let pass."""
        super().parse_arguments(parser, args)
        settings = self.config[self.config["subcommand"]]
        if settings[OPTION.removeprefix("--")] is not None:
            fail(f"{OPTION} is an option of fit on the command line, which trains; give the file of a stage as --config")
        check_values(settings)

    def _parse_ckpt_path(self) -> None:
        """Do nothing. Lightning would let hyper-parameters in the checkpoint override the configuration."""

    def _dump_config(self) -> None:
        """Keep the configuration as plain values. It was validated when it was parsed; Lightning would do that again here."""
        if not hasattr(self, "config_dump"):
            text = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False, skip_validation=True, format="yaml")
            self.config_dump = yaml.safe_load(text)[self.config.subcommand]

    def instantiate_trainer(self, **kwargs: Any) -> RunTrainer:
        """The trainer, with TensorBoard in the folder of the run unless the configuration names a logger.

        Neither the folder nor the logger is a default of the parser, so that the saved ``config.yaml`` can be run again under
        another name. The folder is taken only when the run begins.
        """
        trainer = self._get(self.config_init, "trainer")
        self._plan_memory(trainer)
        check_accelerator(trainer)
        self._root = Path(trainer.get("default_root_dir") or OUTPUTS)
        self._own_logger = trainer.get("logger") in (None, True)
        callbacks = with_console(trainer)
        if self.subcommand == "fit" and self._get(self.config_init, "check_first_rollout"):
            from uae.check.parts.first_rollout import FirstRollout

            callbacks.append(FirstRollout())
        given = {"default_root_dir": str(self._runs().first), "callbacks": callbacks}
        made = super().instantiate_trainer(**kwargs, **given, **({"logger": False} if self._own_logger else {}))
        assert isinstance(made, RunTrainer)
        if type(made.strategy.checkpoint_io) is TorchCheckpointIO:  # the default, so the configuration names none
            made.strategy.checkpoint_io = CheckpointFiles()
        savers = [one for one in made.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        self._savers = [one for one in savers if one.dirpath is None]
        self._elsewhere = [Path(one.dirpath) for one in savers if one.dirpath is not None]
        first = self._runs().first  # until `_own_folder` has chosen
        self._write_to(made, first, None if self.subcommand == "fit" else first / str(self.subcommand))
        return made

    def _runs(self) -> Runs:
        """All runs of this run's name."""
        return Runs(self._root, self._get(self.config_init, "run_name"), str(self._get(self.config_init, "label")))

    def _write_to(self, trainer: RunTrainer, folder: Path, evaluation: Path | None = None) -> None:
        """Send results, checkpoints and what is logged to the folder of a run, or of an evaluation below it."""
        trainer.results = evaluation or folder
        for callback in self._savers:
            callback.dirpath = str(folder / "checkpoints")
        if is_dry_run(trainer):
            return
        labels = "" if evaluation else self._runs().labels
        if self._own_logger:
            trainer.logger = EnduringTensorBoard(str(trainer.results), name="", version=labels)
        for logger in trainer.loggers:
            if isinstance(logger, FollowsRun):
                logger.follow(trainer.results, labels)

    @contextmanager
    def _own_folder(self, subcommand: str) -> Iterator[None]:
        """Inside, this run has a folder that no other run has or gets. The first process chooses it for all."""
        if is_dry_run(self.trainer) or not self.trainer.is_global_zero:
            yield
            return
        runs, checkpoint = self._runs(), self._get(self.config_init, "ckpt_path")
        if subcommand != "fit":
            folder = runs.evaluated_by(checkpoint)
            results = below(folder, subcommand)
            said, new, guard = "", True, None
            self._write_to(self.trainer, folder, results)
        else:
            self._check_dirpaths(checkpoint)
            continued = runs.continued_by(checkpoint)
            results = continued or runs.start()
            said = ", continued" if continued else f"; {runs.first} is another run's" * (results != runs.first)
            new, guard = continued is None, lock(results)
            self._write_to(self.trainer, results)
        print(f"results: {results}{said}", flush=True)
        try:
            yield
        except BaseException:
            if new and self.trainer.global_step == 0:
                give_back(results, runs.labels)
            raise
        finally:
            if guard:
                guard.release()

    def _check_dirpaths(self, checkpoint: str | None) -> None:
        """Refuse to begin a run whose checkpoints would lie beside those of another."""
        for path in self._elsewhere if checkpoint is None else ():
            if any(path.glob("*.ckpt")):
                fail(f"dirpath={str(path)!r} of a checkpoint callback holds checkpoints of another run: name an empty folder")

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

            memory = plan(self.model, self.datamodule, trainer, with_floors=True)
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
            with self._own_folder(subcommand):
                super()._run_subcommand(subcommand)
            self._say_ending()
        except SystemExit as stop:  # Lightning has shut down and asks for status 1
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            interrupted(f"interrupted at step {self.trainer.global_step}" if self.trainer.is_global_zero else "")

    def _say_ending(self) -> None:
        say_ending(self, self._words)


class OfAChain(CLI):
    """A stage of a command with several, of which only the last one says what can be done now."""

    def _say_ending(self) -> None:
        """Say nothing."""


class Parsed(CLI):
    """The configuration of a command of which nothing is made and nothing run."""

    def _set_seed(self) -> None:
        """Seed nothing."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def main(args: list[str] | None = None) -> CLI:
    """Run the command line.

    Args:
        args: Command-line arguments; None reads them from ``sys.argv``.

    Returns:
        The run, or that of the last stage.
    """
    with one_line_errors():
        words = sys.argv[1:] if args is None else args
        return train_in_stages(words, OfAChain, Parsed) if asks_for_stages(words) else CLI(args)
