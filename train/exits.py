"""The table of exit codes, and the errors that lead to them.

A scheduler reads only the exit code, so each code answers one question: retry or not?
A user error is one full sentence that names the field or file, its value, its origin and the
remedy; it is printed without a traceback.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

# Characters of an error's message, of its first line, and of a traceback.
_LONGEST, _LONGEST_LINE, _LONGEST_TRACEBACK = 20_000, 2_000, 100_000


class Exit(IntEnum):
    """Exit codes of every isorun process."""

    DONE = 0  # the run has finished
    USAGE = 64  # usage or config error: never retry
    DATA = 65  # bad input data: never retry
    INTERNAL = 70  # a bug, ours or the user's
    OUT_OF_MEMORY = 71  # never retry with the same config and placement
    RETRY = 75  # the infrastructure failed: retry
    RESUME_REFUSED = 76  # the run directory does not match this command: never retry
    NOT_FINITE = 78  # loss or gradients not finite for too long, or a spike: never retry
    STOPPED_AT_ONCE = 130  # second Ctrl-C: stopped without saving
    PREEMPTED = 143  # stopped on request after a committed checkpoint: rerun to resume


ADVICE = {
    Exit.DONE: "nothing; the same command reports it again",
    Exit.USAGE: "correct what the message names",
    Exit.DATA: "fix the data",
    Exit.INTERNAL: "read the traceback, also in logs/",
    Exit.OUT_OF_MEMORY: "follow the message",
    Exit.RETRY: "fix the cause, then rerun",
    Exit.RESUME_REFUSED: "follow the message",
    Exit.NOT_FINITE: "lower optim.lr, clip, or check the data",
    Exit.STOPPED_AT_ONCE: "rerun; it resumes from the last checkpoint",
    Exit.PREEMPTED: "rerun to resume",
}
"""What the user does after each exit code."""


AGENT_RANK = -1
"""Instead of a rank, in the record of a node agent that ended while it had none."""


def is_worth_retrying(code: int) -> bool:
    """Whether a retry of the same command may succeed.

    ``code``: an exit code, or, for a process that a signal ended, -signal or 128 + signal.
    """
    died_by_signal = code < 0 or 128 < code < 128 + 65
    return code == Exit.RETRY or (died_by_signal and code != Exit.STOPPED_AT_ONCE)


class RunError(Exception):
    """An error that is reported to the user in one sentence; ``code`` is its exit code."""

    code = Exit.INTERNAL


class UsageError(RunError):
    """The command line or the config is wrong."""

    code = Exit.USAGE


class DataError(RunError):
    """The training or evaluation data is wrong."""

    code = Exit.DATA


class OutOfMemoryError(RunError):
    """Does not fit at any micro-batch size or sharding."""

    code = Exit.OUT_OF_MEMORY


class RetryError(RunError):
    """The infrastructure failed, not the run: the same command may succeed later."""

    code = Exit.RETRY


class ResumeRefusedError(RunError):
    """The run directory holds a run that this command must not resume."""

    code = Exit.RESUME_REFUSED


class StoppedError(RunError):
    """The run stopped on request."""

    code = Exit.PREEMPTED


class NotFiniteError(RunError):
    """The loss or the gradient norm was not finite for too many steps in a row."""

    code = Exit.NOT_FINITE


class RollbackError(RetryError):
    """The attempt ends at a spike: the next one goes on from the last checkpoint."""


class SpikeError(RunError):
    """The run ends at a spike, as ``optim.spike.action`` says."""

    code = Exit.NOT_FINITE


def error_of_code(code: int, text: str) -> RunError:
    """The error of a process that ended with this exit code, of the class with the same code."""
    for cls in RunError.__subclasses__():
        if cls.code == code:
            return cls(text)
    error = RunError(text)
    error.code = Exit(code) if code in set(Exit) else Exit.INTERNAL
    return error


@contextmanager
def sys_exit_refused() -> Iterator[None]:
    """Turns a ``sys.exit()`` of the user's code into a RunError: its exit code, 0 for instance,
    says nothing about the run."""
    try:
        yield
    except SystemExit as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RunError(
            f"sys.exit({'' if error.code is None else repr_of(error.code)}) was called in "
            f"{Path(place.filename).name}:{place.lineno} ({place.name}), which is not the end of a "
            "run; raise an error there instead."
        ) from error


def prefixed(prefix: str, error: RunError) -> RunError:
    """The same error with a text before its own: its class, attributes and exit code stay."""
    # Without its constructor, which may take other arguments than a text.
    copy: RunError = RunError.__new__(type(error), f"{prefix}: {error}")
    vars(copy).update(vars(error))
    return copy


def first_line(error: BaseException) -> str:
    """The first line of an error's message without the final full stop, to embed in a sentence."""
    lines = message_of(error).strip().splitlines()
    return shortened(lines[0].rstrip("."), _LONGEST_LINE) if lines else repr_of(error)


def message_of(error: BaseException) -> str:
    """``str(error)``, shortened; also where a class of the user's cannot make it."""
    return shortened(_made(str, error), _LONGEST)


def repr_of(value: object) -> str:
    """``repr(value)``, shortened; also where a class of the user's cannot make it."""
    return shortened(_made(repr, value), _LONGEST_LINE)


def traceback_of(error: BaseException) -> str:
    """The lines of an error's traceback, shortened."""
    return shortened("".join(traceback.format_exception(error)), _LONGEST_TRACEBACK)


def shortened(text: str, most: int) -> str:
    """A text of at most about ``most`` characters: without its middle if it is longer. An error may
    quote a whole data set, and to search a text for secrets takes about 2 s per million."""
    if len(text) <= most:
        return text
    # A part of a word may be a part of a secret, which nothing recognises.
    begin = text[: most // 2]
    begin = begin[: 1 + max(map(begin.rfind, " \t\n"))]
    end = re.sub(r"\A(?:.*\n|\S*)", "", text[-(most // 2) :])
    return f"{begin}... ({len(text) - len(begin) - len(end):,} characters) ...{end}"


def _made(convert: Callable[[object], str], value: object) -> str:
    try:
        return convert(value)
    except Exception as error:
        name = type(value).__name__
        return f"{name}, whose {convert.__name__}() fails with {type(error).__name__}"
