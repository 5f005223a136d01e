"""The command line: ``python -m train COMMAND --config FILE ... [key=value ...]``."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence

from train.command_line import Commands, exit_code_of, print_traceback
from train.commands import COMMANDS
from train.exits import Exit, sys_exit_refused
from train.output import log
from train.process.diagnose import as_run_error, is_lost_peer
from train.process.error_file import write_error_file

_COMMANDS = Commands(
    "train.commands", COMMANDS, "Trains a task; the result does not depend on where it runs."
)

_PRINTING = [
    [name]
    for name in ("show-config", "schema", "new", "runs", "compare", "logs", "goodput", "stacks")
]


def parse(argv: Sequence[str], prog: str = "python -m train") -> argparse.Namespace:
    """Parses the arguments; ``key=value`` overrides may stand anywhere after the command.

    Raises UsageError.
    """
    # The DeepSpeed launcher passes LOCAL_RANK as an argument, too.
    return _COMMANDS.parse([w for w in argv if not re.fullmatch(r"--local[_-]rank=\d+", w)], prog)


def main(argv: Sequence[str] | None = None, prog: str = "python -m train") -> int:
    """Runs a command and returns the exit code; a user's mistake never shows a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _run(words, prog), _unexpected, prints=words[:1] in _PRINTING)


def _run(words: Sequence[str], prog: str) -> int:
    arguments = parse(words, prog)
    with sys_exit_refused():  # argparse exits for --help, the user's code must not
        return int(arguments.run(arguments))


def _unexpected(error: BaseException) -> int:
    """The exit code of an error that is not a RunError."""
    logger = logging.getLogger("train")
    if not is_lost_peer(error):
        write_error_file(error)
    if known := as_run_error(error):
        log(f"error: {known}")
        logger.error("%s", known, exc_info=error)
        return known.code
    print_traceback(error)
    logger.error("unexpected error", exc_info=error)
    return Exit.INTERNAL
