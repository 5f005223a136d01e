"""What all command lines of the project share: parsing, and turning errors into exit codes.

Every error that a user can cause is one sentence on standard error and a code of
:mod:`train.exits`. Modules of commands are imported only when their command is called.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from train.exits import Exit, RetryError, RunError, UsageError, traceback_of
from train.output import log
from train.process.diagnose import as_run_error, is_of_accelerator
from train.process.emergency_output import silence
from train.process.error_file import write_error_file
from train.process.stop_signals import is_of_signal
from train.secrets import redact
from train.suggest import did_you_mean
from train.visible import visible

# What no command can do without, by the name that is imported.
_DEPENDENCIES = {
    "accelerate", "fsspec", "numpy", "omegaconf", "psutil", "pydantic", "rich", "safetensors",
    "torch", "wandb", "yaml",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors of one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message[:1].upper()}{message[1:]}; see `{self.prog} --help`.")


@dataclass(frozen=True)
class Commands:
    """The commands of one package, each a module with ``add_arguments`` and ``run``."""

    package: str
    """The package of the modules; ``show-config`` is the module ``show_config``."""
    summaries: Mapping[str, str]
    """Name to one line of help."""
    description: str

    def parse(self, argv: Sequence[str], prog: str) -> argparse.Namespace:
        """Parses the words after the program's name; the result's ``run`` is the command's.

        ``key=value`` overrides may stand anywhere after the command. Raises UsageError.
        """
        check_command_first(argv, self.summaries, prog)
        if argv and not argv[0].startswith("-"):
            check_command(argv[0], self.summaries)
        called = next((word for word in argv if not word.startswith("-")), None)
        parser = self._parser(prog, called)
        arguments, rest = parser.parse_known_args(argv)
        takes_overrides = hasattr(arguments, "overrides")
        unknown = [word for word in rest if word.startswith("-") or not takes_overrides]
        if unknown:
            _refuse(unknown[0], arguments, prog)
        if rest:
            arguments.overrides += rest
        return arguments

    def _parser(self, prog: str, called: str | None) -> Parser:
        parser = Parser(
            prog=prog,
            description=self.description,
            epilog=f"Each command has its own help: {prog} COMMAND --help",
        )
        commands = parser.add_subparsers(
            dest="command", metavar="COMMAND", required=True, parser_class=Parser
        )
        for name, summary in self.summaries.items():
            if name != called:
                commands.add_parser(name, help=summary)
                continue
            module = importlib.import_module(f"{self.package}.{name.replace('-', '_')}")
            command = commands.add_parser(
                name,
                help=summary,
                description=module.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.add_arguments(command)
            command.set_defaults(run=module.run)
        return parser


def check_command(word: str, commands: Iterable[str]) -> None:
    """Raises UsageError if ``word`` is not one of the commands."""
    commands = list(commands)
    if word not in commands:
        raise UsageError(
            f"{word!r} is not a command{did_you_mean(word, commands)} The commands are "
            f"{', '.join(commands)}."
        )


def check_command_first(argv: Sequence[str], commands: Iterable[str], prog: str) -> None:
    """Raises UsageError if options stand before the command; ``--help`` and ``--version`` may."""
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        known = set(commands)
        if named := next((word for word in argv if word in known), None):
            raise UsageError(
                f"The command must be the first argument, but is after {argv[0]!r}; write "
                f"`{prog} {named} ...`."
            )


def _refuse(unknown: str, arguments: argparse.Namespace, prog: str) -> NoReturn:
    flags = [f"--{name.replace('_', '-')}" for name in vars(arguments) if name != "run"]
    hint = did_you_mean(unknown, flags)
    if hint == ".":
        hint = f"; see `{prog} {arguments.command} --help`."
    raise UsageError(f"Unknown argument {unknown!r}{hint}")


def key_value(word: str) -> tuple[str, str] | None:
    """Key and value of ``key=value``, without blanks around them; None without a key or ``=``."""
    key, equals, value = word.partition("=")
    return (key.strip(), value.strip()) if equals and key.strip() else None


def python_module(name: str) -> list[str]:
    """The command that runs a module of this project in a process of its own.

    ``python -m train`` alone runs a ``train.py`` of the working directory, if there is one. ``-P``
    leaves that directory out, except where it holds this very package, perhaps not installed.
    """
    return [sys.executable, *safe_path_options(), "-m", name]


def safe_path_options() -> list[str]:
    """The options of Python that :func:`python_module` needs in the working directory."""
    return [] if Path().samefile(Path(__file__).parents[1]) else ["-P"]


def exit_code_of(
    command: Callable[[], int],
    unexpected: Callable[[BaseException], int | None] | None = None,
    *,
    prints: bool = False,
) -> int:
    """Calls a command and returns its exit code.

    A RunError becomes one line per sentence on standard error, without a traceback. ``unexpected``
    may handle any other error and return its code; otherwise a fault of the machine is one line,
    too, and what remains is printed with a traceback and has the code 70. With ``prints`` the
    purpose of the command is its output, so it is done if the reader of the output, such as
    ``head``, has closed it.
    """
    logging.getLogger("train").addHandler(logging.NullHandler())  # report prints the error
    try:
        code = _code(command, unexpected, prints)
    finally:
        lost = _flush()
    return code or (report(lost) if lost else Exit.DONE)


def _code(
    command: Callable[[], int],
    unexpected: Callable[[BaseException], int | None] | None,
    prints: bool,
) -> int:
    try:
        return int(command())
    except SystemExit:
        raise
    # Some libraries raise errors that are no Exceptions, such as a panic of a library in Rust.
    except BaseException as error:
        code = _code_of(error, unexpected, prints)
        if is_of_accelerator(error):
            # Destructors of the tensors in the error's frames would abort the process.
            _flush()
            os._exit(code)
        return code


def _code_of(
    error: BaseException, unexpected: Callable[[BaseException], int | None] | None, prints: bool
) -> int:
    if isinstance(error, RunError):
        return report(error)
    if is_of_signal(error):
        log("stopped.")
        return Exit.STOPPED_AT_ONCE
    if prints and isinstance(error, BrokenPipeError):
        return Exit.DONE
    return _unexpected_code(error, unexpected)


def _unexpected_code(
    error: BaseException, unexpected: Callable[[BaseException], int | None] | None
) -> int:
    if missing := _missing_dependency(error):
        return report(missing)
    code = unexpected(error) if unexpected else None
    if code is not None:
        return code
    if known := as_run_error(error):
        return report(known)
    print_traceback(error)
    return Exit.INTERNAL


def print_traceback(error: BaseException) -> None:
    """Prints an error that is a bug on standard error. The command goes on if that fails."""
    with suppress(OSError):
        print(visible(redact(traceback_of(error))), end="", file=sys.stderr)


def report(error: RunError) -> int:
    """Prints the error, and leaves it where launchers look for it. Returns its exit code."""
    write_error_file(error)
    for line in str(error).splitlines():
        log(f"error: {line}")
    # The traceback of the cause is for the log file only.
    logging.getLogger("train").error("%s", error, exc_info=error.__cause__)
    return error.code


def _flush() -> RetryError | None:
    """Flushes the output, or else Python does and exits with 120 if that fails. Returns an error
    for standard output that is lost, unless its reader has closed it."""
    lost = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            silence(stream)
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                lost = RetryError(
                    f"Standard output cannot be written: {error.strerror}. Fix the cause, then "
                    "rerun."
                )
    return lost


def say(text: str) -> None:
    """Prints a line on standard output, with control characters as escapes. The command goes on if
    the reader has closed it."""
    with suppress(BrokenPipeError):
        print(visible(text), flush=True)


def _missing_dependency(error: BaseException) -> UsageError | None:
    """The error for an installation without its dependencies; None for any other error."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").partition(".")[0]
    if package not in _DEPENDENCIES:
        return None
    return UsageError(
        f"The package {package!r} is not installed for {sys.executable}; install isorun with its "
        "dependencies: `pip install isorun`, or `pip install .` in its source directory."
    )
