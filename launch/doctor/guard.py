"""Runs checks with a time limit; checks that raise or do not end become findings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from launch.contract import RunError, first_line, is_worth_retrying
from launch.doctor.findings import Finding, infrastructure_failure, misconfigured

Check = Callable[[], list[Finding]]
T = TypeVar("T")


def bounded(name: str, check: Check, seconds: float) -> list[Finding]:
    """The findings of one check, or a finding that it failed or did not end in time."""
    return bounded_together([(name, check)], seconds)


def bounded_together(checks: Sequence[tuple[str, Check]], seconds: float) -> list[Finding]:
    """The findings of several checks that run at the same time, in their order.

    Each runs in a thread of its own, which stays behind if it hangs: an access to a network file
    system that is gone cannot be interrupted.
    """
    found: dict[int, list[Finding]] = {}

    def run(number: int, name: str, check: Check) -> None:
        try:
            found[number] = check()
        except RunError as error:
            failed = infrastructure_failure if is_worth_retrying(error.code) else misconfigured
            found[number] = [failed(name, str(error), "")]
        except (Exception, SystemExit) as error:
            text = f"the check itself failed: {type(error).__name__}: {first_line(error)}"
            found[number] = [infrastructure_failure(name, text, "fix the cause, then rerun")]

    threads = [
        threading.Thread(target=run, args=(number, *named), name=named[0], daemon=True)
        for number, named in enumerate(checks)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    findings = []
    for number, (name, _) in enumerate(checks):
        threads[number].join(max(0.0, deadline - time.monotonic()))
        late = infrastructure_failure(
            name,
            f"timed out after {seconds:g} s",
            "a file system or a network that it accesses does not answer",
        )
        findings += found.get(number, [late])
    return findings


def attempt(call: Callable[[], T], seconds: float) -> tuple[T | None, str]:
    """The result of a call into the user's code, or None and the reason."""
    results: list[T] = []

    def run() -> list[Finding]:
        results.append(call())
        return []

    findings = bounded("attempt", run, seconds)
    return (results[0], "") if results and not findings else (None, findings[0].text)
