"""What a process's exit says: the one table of exit codes, and the errors that carry them.

A scheduler reads only the exit code, so each code answers one question: retry, or give up?
An error for the user is one full sentence that names the field or file, its value, where it
came from and what to do; it is printed without a traceback.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every isorun process."""

    DONE = 0  # the run has finished
    USAGE = 64  # usage or config error: never retry
    DATA = 65  # bad input data: never retry
    INTERNAL = 70  # a bug, ours or the user's
    OUT_OF_MEMORY = 71  # needs more memory than there is: never retry as it is
    RETRY = 75  # infrastructure failed: try again
    RESUME_REFUSED = 76  # the run directory does not fit this command
    NOT_FINITE = 78  # loss or gradients not finite for too long: never retry
    STOPPED_AT_ONCE = 130  # second Ctrl-C: nothing more was saved
    PREEMPTED = 143  # stopped on request after a committed checkpoint: run again to go on


ADVICE = {
    Exit.DONE: "nothing; the same command says so again",
    Exit.USAGE: "read the sentence, correct it",
    Exit.DATA: "repair the data",
    Exit.INTERNAL: "read the traceback, also in logs/",
    Exit.OUT_OF_MEMORY: "do as the sentence says",
    Exit.RETRY: "see to the cause, run again",
    Exit.RESUME_REFUSED: "do as the sentence says",
    Exit.NOT_FINITE: "lower optim.lr, clip, look at the data",
    Exit.STOPPED_AT_ONCE: "run again; it goes on from the last checkpoint",
    Exit.PREEMPTED: "run again to go on",
}
"""What to do after each."""


def is_worth_retrying(code: int) -> bool:
    """Whether the same command may get further the next time.

    ``code``: an exit code; of a process that a signal ended, minus the signal or 128 plus it.
    """
    died_by_signal = code < 0 or 128 < code < 128 + 65
    return code == Exit.RETRY or (died_by_signal and code != Exit.STOPPED_AT_ONCE)


class RunError(Exception):
    """An error told to the user in one sentence; ``code`` is the exit code it leads to."""

    code = Exit.INTERNAL


class UsageError(RunError):
    """The command line or the config is wrong."""

    code = Exit.USAGE


class DataError(RunError):
    """The training or evaluation data is wrong."""

    code = Exit.DATA


class OutOfMemoryError(RunError):
    """It needs more memory than there is, however it is cut."""

    code = Exit.OUT_OF_MEMORY


class RetryError(RunError):
    """The machine failed, not the run: the same command may work later."""

    code = Exit.RETRY


class ResumeRefusedError(RunError):
    """The run directory holds something that this command must not go on with."""

    code = Exit.RESUME_REFUSED


class StoppedError(RunError):
    """The run was asked to stop, and has."""

    code = Exit.PREEMPTED


class NotFiniteError(RunError):
    """The loss or the gradient norm was not finite for too many steps in a row."""

    code = Exit.NOT_FINITE


def first_line(error: BaseException) -> str:
    """What an error says, in one line without a full stop, to be put into a sentence."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)
