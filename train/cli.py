"""The command line: ``python -m train COMMAND --config FILE ... [key=value ...]``."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import traceback
from collections.abc import Sequence

from train.command_line import Commands, exit_code_of
from train.commands import COMMANDS
from train.exits import Exit, sys_exit_refused
from train.process.diagnose import as_run_error, is_lost_peer
from train.process.error_file import write_error_file

_COMMANDS = Commands(
    "train.commands", COMMANDS, "Trains a task; the result does not depend on where it runs."
)


def parse(argv: Sequence[str], prog: str = "python -m train") -> argparse.Namespace:
    """Parses the arguments; ``key=value`` overrides may stand anywhere after the command.

    Raises UsageError.
    """
    # The DeepSpeed launcher passes LOCAL_RANK as an argument, too.
    return _COMMANDS.parse([w for w in argv if not re.fullmatch(r"--local[_-]rank=\d+", w)], prog)


def main(argv: Sequence[str] | None = None, prog: str = "python -m train") -> int:
    """Runs a command and returns the exit code; a user's mistake never shows a traceback."""
    command = ""

    def run() -> int:
        nonlocal command
        arguments = parse(sys.argv[1:] if argv is None else argv, prog)
        command = arguments.command
        with sys_exit_refused():  # argparse exits for --help, the user's code must not
            return int(arguments.run(arguments))

    return exit_code_of(run, lambda error: _unexpected(error, command))


def _unexpected(error: Exception, command: str) -> int:
    """The exit code of an error that is not a RunError."""
    log = logging.getLogger("train")
    if isinstance(error, BrokenPipeError) and command != "fit":
        return Exit.DONE  # the reader of the output has closed it, such as head
    if not is_lost_peer(error):
        write_error_file(error)
    if known := as_run_error(error):
        print(f"isorun: error: {known}", file=sys.stderr)
        log.error("%s", known, exc_info=error)
        return known.code
    traceback.print_exception(error)
    log.error("unexpected error", exc_info=error)
    return Exit.INTERNAL
