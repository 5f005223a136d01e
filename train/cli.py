"""The command line: ``python -m train COMMAND --config FILE ... [key=value ...]``."""

from __future__ import annotations

import argparse
import errno
import logging
import re
import sys
import traceback
from collections.abc import Sequence

from train.command_line import Commands, exit_code_of
from train.commands import COMMANDS
from train.exits import Exit, first_line
from train.process.diagnose import LOST_PEER, OUT_OF_MEMORY, is_lost_peer, is_out_of_memory
from train.process.error_file import write_error_file

_COMMANDS = Commands(
    "train.commands", COMMANDS, "Trains a task; the result does not depend on where it runs."
)

# Errors of the machine, not of the run: it can continue once there is space, or storage.
_MACHINE_FAILED = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}


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
        return int(arguments.run(arguments))

    return exit_code_of(run, lambda error: _unexpected(error, command))


def _unexpected(error: Exception, command: str) -> Exit:
    """The exit code of an error that is not a RunError."""
    log = logging.getLogger("train")
    if isinstance(error, BrokenPipeError) and command != "fit":
        return Exit.DONE  # the reader of the output has closed it, such as head
    if not is_lost_peer(error):
        write_error_file(error)
    if is_out_of_memory(error):
        print(f"isorun: error: {OUT_OF_MEMORY.format(first_line(error))}", file=sys.stderr)
        log.exception("out of memory")
        return Exit.OUT_OF_MEMORY
    if is_lost_peer(error):
        print(f"isorun: error: {LOST_PEER}", file=sys.stderr)
        log.exception("lost the connection to another rank")
        return Exit.RETRY
    if isinstance(error, OSError) and error.errno in _MACHINE_FAILED:
        print(f"isorun: error: {error}. Fix the cause, then rerun.", file=sys.stderr)
        return Exit.RETRY
    traceback.print_exc()
    log.exception("unexpected error")
    return Exit.INTERNAL
