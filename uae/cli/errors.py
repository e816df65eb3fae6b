"""What a user sees when something goes wrong: one line for a mistake, the traceback for a defect."""

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
from typing import NoReturn

from lightning.pytorch.utilities.exceptions import MisconfigurationException

OUTPUTS = "outputs"
PACKAGE = Path(__file__).parents[1]
INTERRUPTED = 130  # 128 + SIGINT, what shells expect
_CHATTER = ("KeyboardInterrupt", "litlogger")  # messages of Lightning that say nothing our own do not
_EXPECTED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning 2.6 with torch 2.11 and newer
    r"Found \d+ module\(s\) in eval mode",  # frozen parts are meant to be
    r".*is_gradient_checkpointing` is deprecated",  # peft 0.21 with transformers 5.23
    r"`torch_dtype` is deprecated",  # its successor is unknown to diffusers 0.39
    r"It is recommended to use `self\.log\(.*sync_dist=True",  # metrics and measurements are reduced before they are logged
    r"The '\w+' does not have many workers",  # scenes are cheaper to draw than to send
)
_REFUSED_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
_OF_A_WORKER = re.compile(  # how PyTorch passes on what a process that loads data raised: its traceback as text
    r'Caught (?:Value|Runtime)Error in DataLoader worker .*File "(?P<file>[^"\n]+)", line \d+, in [^\n]+\n\s+raise [^\n]*\n'
    r"(?:\s[^\n]*\n)*(?:Value|Runtime)Error: (?P<message>.*)",
    re.DOTALL,
)
_SPEAKS_TO_USERS = ("uae.", "callbacks.", "lightning.pytorch.trainer.")


def mistake(error: BaseException) -> str | None:
    """The one line a user needs, or None where the traceback is needed: the error is a defect, not a mistake."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if isinstance(error, OSError) and error.errno in _REFUSED_WRITING:
        return in_one_line(f"{error}: results go to {OUTPUTS}/<run_name>, make room or correct run_name")
    if isinstance(error, (FileNotFoundError, MisconfigurationException)):
        return in_one_line(str(error))
    if type(error).__module__.startswith("omegaconf"):
        return in_one_line(f"interpolation in the configuration: {error}")
    return next((line for line in map(_written_for_users, chain) if line), None)


def _written_for_users(error: BaseException) -> str | None:
    """The message, if a ``raise`` statement made it whose message is written for users."""
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None or not isinstance(error, (ValueError, RuntimeError, ArithmeticError)):
        return None
    if (worker := _OF_A_WORKER.match(str(error))) and Path(worker["file"]).is_relative_to(PACKAGE):
        return in_one_line(worker["message"])
    code = innermost.tb_frame.f_code
    written_for_users = str(innermost.tb_frame.f_globals.get("__name__")).startswith(_SPEAKS_TO_USERS)
    raised = linecache.getline(code.co_filename, innermost.tb_lineno).lstrip().startswith("raise ")
    return in_one_line(str(error)) if written_for_users and raised else None


def in_one_line(text: str) -> str:
    """A message without line breaks."""
    return " ".join(text.split())


def quieten() -> None:
    """Silence what libraries say to their developers, so that what is left deserves to be read."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_worth_saying)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _worth_saying(record: logging.LogRecord) -> bool:
    return not any(word in str(record.msg) for word in _CHATTER)


def debugging() -> bool:
    """Whether ``UAE_DEBUG`` asks for everything."""
    return bool(os.environ.get("UAE_DEBUG"))


def fail(line: str) -> NoReturn:
    """Say what is wrong and exit with status 2."""
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


def interrupted(line: str = "interrupted") -> NoReturn:
    """Say so and exit with status 130."""
    if line:
        print(f"\n{line}", file=sys.stderr)
    raise SystemExit(INTERRUPTED) from None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Inside, user mistakes are one line and status 2, Ctrl-C is one line and status 130."""
    quieten()
    try:
        yield
    except KeyboardInterrupt:
        interrupted()
    except Exception as error:
        line = None if debugging() else mistake(error)
        if line is None:
            raise
        fail(line)
