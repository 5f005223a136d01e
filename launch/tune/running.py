"""A trial that runs here, and what its exit code is called."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field

from launch.contract import Exit, RunDirectory
from launch.tune.backend import TrialJob
from launch.tune.study import Claim
from launch.tune.trial import Evaluations


@dataclass
class RunningTrial:
    """A trial that a controller works on."""

    claim: Claim
    place: int
    job: TrialJob
    evaluations: Evaluations
    run: RunDirectory
    not_before: float = 0.0
    """The monotonic time at which it may start."""
    waiting_since: float = field(default_factory=time.monotonic)
    reported_wait: bool = False
    step: int | None = None
    """The step of the newest evaluation."""
    final: int | None = None
    is_pausing: bool = False
    """Whether it was asked to stop at a rung."""


def named_exit(code: int) -> str:
    """An exit code with its name."""
    return f"exit code {code} ({exit_facts(code)['exit']})"


def exit_facts(code: int) -> dict[str, int | str]:
    """An exit code and its class."""
    if code in set(Exit):
        return {"exit_code": code, "exit": Exit(code).name}
    try:
        name = signal.Signals(code - 128).name if code > 128 else ""
    except ValueError:
        name = ""
    return {"exit_code": code, "exit": name or "UNKNOWN"}
