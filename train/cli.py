"""The command line: ``python -m train COMMAND --config FILE ... [key=value ...]``."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from train.exits import Exit, RunError, UsageError, first_line
from train.process.diagnose import LOST_PEER, OUT_OF_MEMORY, is_lost_peer, is_out_of_memory
from train.process.error_file import write_error_file
from train.suggest import did_you_mean

COMMANDS = {
    "fit": "start a run, or go on with it if its directory holds one",
    "evaluate": "evaluate a checkpoint on the evaluation data",
    "parity": "prove that placements change nothing: the same run on each, compared",
    "export": "save a trained model: parameters, program, or both",
    "verify": "prove that checkpoints are whole and each sample was used once",
    "show-config": "print the resolved config and where each value comes from",
    "schema": "print the JSON schema of the config, for editors",
    "new": "write a project of your own to start from",
}


# Whoever meets these, the run is not to blame: it may go on once there is room, or storage.
_MACHINE_FAILED = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}


class _Parser(argparse.ArgumentParser):
    """argparse with errors by the exit-code table and one sentence long."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}; see `{self.prog} --help`.")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each command's module adds its own arguments."""
    parser = _Parser(
        prog="python -m train",
        description="Trains a task; the result does not depend on where it runs.",
        epilog="Each command has its own help: python -m train COMMAND --help",
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for name, text in COMMANDS.items():
        module = importlib.import_module(_module(name))
        command = commands.add_parser(
            name, help=text, description=module.__doc__, formatter_class=_Formatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


def _module(command: str) -> str:
    return f"train.commands.{command.replace('-', '_')}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments; ``key=value`` overrides may stand anywhere after the command."""
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise UsageError(
            f"{argv[0]!r} is not a command{did_you_mean(argv[0], COMMANDS)} The commands are "
            f"{', '.join(COMMANDS)}."
        )
    # The DeepSpeed launcher says by an argument what it also says by LOCAL_RANK.
    argv = [word for word in argv if not re.fullmatch(r"--local[_-]rank=\d+", word)]
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    takes_overrides = hasattr(arguments, "overrides")
    strangers = [item for item in rest if item.startswith("-") or not takes_overrides]
    if strangers:
        _refuse(strangers[0], arguments)
    if rest:
        arguments.overrides += rest
    return arguments


def _refuse(stranger: str, arguments: argparse.Namespace) -> NoReturn:
    """An argument that the command does not have."""
    flags = [f"--{name.replace('_', '-')}" for name in vars(arguments) if name != "run"]
    hint = did_you_mean(stranger, flags)
    if hint == ".":
        hint = f"; see `python -m train {arguments.command} --help`."
    raise UsageError(f"Unknown argument {stranger!r}{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code; a user's mistake never shows a traceback."""
    logging.getLogger("train").addHandler(logging.NullHandler())  # the print below is enough
    command = None
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        command = arguments.command
        return int(arguments.run(arguments))
    except RunError as error:
        write_error_file(error)
        for line in str(error).splitlines():
            print(f"isorun: error: {line}", file=sys.stderr)
        # With the traceback of what is behind it, for the log file only.
        logging.getLogger("train").error("%s", error, exc_info=error.__cause__)
        return error.code
    except KeyboardInterrupt:
        print("isorun: stopped.", file=sys.stderr)
        return Exit.STOPPED_AT_ONCE
    except Exception as error:
        return _unexpected(error, command)


def _unexpected(error: Exception, command: str | None) -> Exit:
    """What an error that nobody has put into words means."""
    log = logging.getLogger("train")
    if isinstance(error, BrokenPipeError) and command != "fit":
        return Exit.DONE  # the reader of our output has seen enough
    if not is_lost_peer(error):
        write_error_file(error)
    if is_out_of_memory(error):
        print(f"isorun: error: {OUT_OF_MEMORY.format(first_line(error))}", file=sys.stderr)
        log.exception("out of memory")
        return Exit.OUT_OF_MEMORY
    if is_lost_peer(error):
        print(f"isorun: error: {LOST_PEER}", file=sys.stderr)
        log.exception("another rank is gone")
        return Exit.RETRY
    if isinstance(error, OSError) and error.errno in _MACHINE_FAILED:
        print(f"isorun: error: {error}; see to it, then start it again.", file=sys.stderr)
        return Exit.RETRY
    traceback.print_exc()
    log.exception("unexpected error")
    return Exit.INTERNAL
