"""The command line: ``python -m uae.cli``."""

import uae.cli.environment  # noqa: F401  registers "oc.env"
from uae.cli.callbacks_package import share_callbacks
from uae.cli.command import CLI, main
from uae.cli.errors import INTERRUPTED, debugging, fail, mistake, one_line_errors

__all__ = ["CLI", "INTERRUPTED", "debugging", "fail", "main", "mistake", "one_line_errors", "share_callbacks"]
