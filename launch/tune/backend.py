"""Where trials run: what the controller needs of it.

``launch.tune.trial`` starts the ranks on this machine; ``launch.torchx.trial_jobs`` submits each
trial as a TorchX job.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from launch.tune.study import Claim


class TrialJob(ABC):
    """The processes of a trial, wherever they run."""

    place: str
    """Where their output is, for people."""

    @abstractmethod
    def find(self) -> bool:
        """Whether the processes that another controller has started still run, or have ended with
        a result; they are watched from here then, and ``started`` is true."""

    @abstractmethod
    def start(self, variables: Mapping[str, str]) -> None:
        """Starts them with these further environment variables. Raises RunError."""

    @property
    @abstractmethod
    def started(self) -> bool:
        """Whether they run or have run."""

    @abstractmethod
    def code(self) -> int | None:
        """The exit code, 128 + signal for a death by signal; None while they run."""

    @abstractmethod
    def stop(self) -> None:
        """Asks them to save a checkpoint and to stop."""

    @abstractmethod
    def interrupt(self, number: signal.Signals) -> bool:
        """This command was asked to stop by a signal. Returns whether the processes stop too; those
        that do not are found again by the next start."""

    @abstractmethod
    def kill(self) -> None:
        """Ends them at once and waits for that, unless they outlive this command."""

    @abstractmethod
    def last_error(self) -> str:
        """The error that they have reported; empty without one."""


class Backend(ABC):
    """Makes jobs of trials."""

    parallel: int
    """Trials at a time."""

    @abstractmethod
    def check(self, files: Sequence[str], overrides: Sequence[str]) -> None:
        """Raises RunError if a trial with these config files and overrides could not start here."""

    @abstractmethod
    def job(self, claim: Claim, words: Sequence[str], place: int) -> TrialJob:
        """The job of a trial, not started; ``words``: its config files and overrides as arguments
        of ``fit``; ``place``: from 0 to ``parallel`` - 1."""

    @abstractmethod
    def close(self) -> None:
        """Frees what belongs to this command."""
