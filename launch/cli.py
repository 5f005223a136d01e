"""The command line: ``python -m launch COMMAND ...``. Runs are started by ``torchx run``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from launch.contract import Exit, RunError, UsageError, did_you_mean

COMMANDS = {
    "history": "list the launches of this user, and what became of them",
    "show": "print all that is known of one launch",
    "why": "say why a launch failed, and what to do",
    "render": "print the Kubernetes objects of a run",
}


class _Parser(argparse.ArgumentParser):
    """argparse with errors by the exit-code table and one sentence long."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}; see `{self.prog} --help`.")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; of all commands' modules only that of ``command`` is loaded."""
    parser = _Parser(
        prog="python -m launch",
        description="Looks back at launches, and renders what a cluster is given. Runs are started "
        "by `torchx run isorun.fit`.",
        epilog="Each command has its own help: python -m launch COMMAND --help",
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for name, text in COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=text)
            continue
        module = importlib.import_module(f"launch.commands.{name}")
        parsed = commands.add_parser(
            name,
            help=text,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parsed)
        parsed.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code; a user's mistake never shows a traceback."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        command = argv[0] if argv and not argv[0].startswith("-") else None
        if command is not None and command not in COMMANDS:
            raise UsageError(
                f"{command!r} is not a command{did_you_mean(command, COMMANDS)} The commands are "
                f"{', '.join(COMMANDS)}."
            )
        arguments = build_parser(command).parse_args(argv)
        return int(arguments.run(arguments))
    except RunError as error:
        for line in str(error).splitlines():
            print(f"isorun: error: {line}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return Exit.DONE
    except KeyboardInterrupt:
        return Exit.STOPPED_AT_ONCE
