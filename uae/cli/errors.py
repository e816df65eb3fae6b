"""Errors on the command line: one line if the user can correct the cause, the traceback if it is a defect of the code."""

from __future__ import annotations

import errno
import linecache
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import NoReturn

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from uae.cli.blame import blamed

OUTPUTS = "outputs"
OF_A_RUN = f"results go to {OUTPUTS}/<run_name>, make room or correct run_name"
PACKAGE = Path(__file__).parents[1]
INTERRUPTED = 130  # 128 + SIGINT, what shells expect
_CHATTER = (  # in messages of Lightning that repeat ours, advertise, or speak of hardware that nobody asked for
    "KeyboardInterrupt", "litlogger", "model summary callbacks", "TPU available", "HPU available", "GPU available: False",
)  # fmt: skip
_EXPECTED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning 2.6 with torch 2.11 and newer
    r"Found \d+ module\(s\) in eval mode",  # frozen parts are in eval mode on purpose
    r".*is_gradient_checkpointing` is deprecated",  # peft 0.21 with transformers 5.23
    r"Checkpoint directory .* exists and is not empty",  # a run that goes on in its folder
    r"The dirpath has changed from",  # a run that branches off from another
    r"\.fit\(ckpt_path=\"last\"\) is set, but there is no last checkpoint",  # one command starts and continues a run
    r"Couldn't infer the batch indices fetched",  # predictions are written by name
    r"It is recommended to use `self\.log\(.*sync_dist=True",  # they are reduced before they are logged
    r"LightningCLI's args parameter is intended",  # the stages of a command get their own
    r"The '\w+' does not have many workers",  # drawing a scene takes less time than sending it between processes
)
_REFUSED_WRITING = (
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)
_BATCHES = (
    "lightning.pytorch.loops.fetchers",
    "lightning.pytorch.loops.training_epoch_loop",
)  # at work: the run has begun
SEE_ALL = "UAE_DEBUG=1 shows the traceback"
_OF_A_WORKER = re.compile(  # PyTorch reports an error of a data-loading process as the text of its traceback
    r'Caught (?:Value|Runtime)Error in DataLoader worker .*File "(?P<file>[^"\n]+)", line \d+, in [^\n]+\n\s+raise [^\n]*\n'
    r"(?:\s[^\n]*\n)*(?:Value|Runtime)Error: (?P<message>.*)",
    re.DOTALL,
)
_IN_A_LIST = re.compile(r"Problem with given class_path '(?P<name>[^']+)':\s*(?P<message>[^\n]+)")
_RAISE = re.compile(r"(^|[:;])\s*raise\b")
_OURS = ("uae.", "callbacks.")
_TRAINER = "lightning.pytorch.trainer."


def mistake(error: BaseException, advice: str = OF_A_RUN) -> str | None:
    """The message of an error that the user can correct, in one line; None if the error is a defect of the code.

    These can be corrected: what this project and Lightning's trainer refuse at any time; and before the first batch, what
    anything refuses that a class of the configuration calls, because then the configuration's values are at fault.

    Args:
        error: The error.
        advice: What to do where results cannot be written.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if isinstance(error, OSError) and error.errno in _REFUSED_WRITING:
        return in_one_line(f"{error}: {advice}")
    if isinstance(error, FileNotFoundError):
        return in_one_line(str(error))
    if type(error).__module__.startswith("omegaconf"):
        return in_one_line(f"interpolation in the configuration: {error}")
    written = next((line for line in map(_written_for_users, chain) if line), None)
    return written or _refused_by_a_class(chain) or _refused_in_a_list(chain)


def _written_for_users(error: BaseException) -> str | None:
    """The message, if a ``raise`` statement of this project made the error, which then names the key; else None."""
    if error.__traceback__ is None or not isinstance(error, (ValueError, RuntimeError, ArithmeticError)):
        return None
    if (worker := _OF_A_WORKER.match(str(error))) and Path(worker["file"]).is_relative_to(PACKAGE):
        return in_one_line(worker["message"])
    return in_one_line(str(error)) if _origin(error).startswith(_OURS) and _raised(error) else None


def _refused_in_a_list(chain: list[BaseException]) -> str | None:
    """The class and its message, if a class in a list could not be built; else None.

    The parser tries every type that the value may have, reports all of them, and only the first is the cause of its error.
    """
    for error in chain:
        if _origin(error).startswith("jsonargparse") and (found := _IN_A_LIST.search(str(error))):
            return in_one_line(f"{found['name']}: {found['message'].rstrip('.')}; {SEE_ALL}")
    return None


def _refused_by_a_class(chain: list[BaseException]) -> str | None:
    """The key and the message, if a class of the configuration met a value or a machine that it cannot work with; else None."""
    cause = next((error for error in reversed(chain) if not _origin(error).startswith("jsonargparse")), chain[0])
    foreseen = isinstance(cause, MisconfigurationException) or (_raised(cause) and _origin(cause).startswith(_TRAINER))
    begun = any(_module(frame).startswith(_BATCHES) for error in chain for frame, _ in walk_tb(error.__traceback__))
    if not foreseen and (begun or not (isinstance(cause, (ImportError, OSError)) or _raised(cause))):
        return None
    culprit, text = blamed(chain), str(cause) or type(cause).__name__
    if culprit is None:
        return in_one_line(text) if foreseen else None
    return in_one_line(f"{culprit.accused(text)}: {text.rstrip('.')}; {SEE_ALL}")


def _raised(error: BaseException) -> bool:
    """Whether a ``raise`` statement made the error, so that its message was written to be read."""
    *_, (frame, line) = walk_tb(error.__traceback__)
    return bool(_RAISE.search(linecache.getline(frame.f_code.co_filename, line)))


def _origin(error: BaseException) -> str:
    """The module in which an error was made."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return _module(frame)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def in_one_line(text: str) -> str:
    """A message with line breaks and repeated spaces replaced by one space."""
    return " ".join(text.split())


def quieten() -> None:
    """Silence messages and warnings of libraries that users can do nothing about."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_worth_saying)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _worth_saying(record: logging.LogRecord) -> bool:
    return not any(part in str(record.msg) for part in _CHATTER)


def debugging() -> bool:
    """Whether the environment variable ``UAE_DEBUG`` is set, which shows tracebacks and full reports."""
    return bool(os.environ.get("UAE_DEBUG"))


def fail(line: str) -> NoReturn:
    """Print an error and exit with status 2."""
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


def interrupted(line: str = "interrupted") -> NoReturn:
    """Print a line, unless it is empty, and exit with status 130."""
    if line:
        print(f"\n{line}", file=sys.stderr)
    raise SystemExit(INTERRUPTED) from None


@contextmanager
def one_line_errors(advice: str = OF_A_RUN) -> Iterator[None]:
    """Inside, an error that the user can correct is printed in one line with status 2; Ctrl-C gives status 130.

    Args:
        advice: What to do where results cannot be written.
    """
    quieten()
    try:
        yield
    except KeyboardInterrupt:
        interrupted()
    except Exception as error:
        line = None if debugging() else mistake(error, advice)
        if line is None:
            raise
        fail(line)
