"""Checks that raise, or that do not end, become findings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from launch.contract import RunError, first_line, is_worth_retrying
from launch.doctor.findings import Finding, broken, misset

Check = Callable[[], list[Finding]]
T = TypeVar("T")


def bounded(name: str, check: Check, seconds: float) -> list[Finding]:
    """What ``check`` finds within ``seconds``; else what became of it."""
    return bounded_together([(name, check)], seconds)


def bounded_together(checks: Sequence[tuple[str, Check]], seconds: float) -> list[Finding]:
    """What the checks find, run at the same time; in their order.

    Each has a thread of its own, which is left behind if it hangs: a file system that is gone
    lets nobody interrupt who asks for it.
    """
    found: dict[int, list[Finding]] = {}

    def run(number: int, name: str, check: Check) -> None:
        try:
            found[number] = check()
        except RunError as error:
            judged = broken if is_worth_retrying(error.code) else misset
            found[number] = [judged(name, str(error), "")]
        except (Exception, SystemExit) as error:
            text = f"the check itself failed: {type(error).__name__}: {first_line(error)}"
            found[number] = [broken(name, text, "see to what it names, then start it again")]

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
        late = broken(
            name,
            f"it did not come to an end within {seconds:g} s",
            "what it looks at hangs, such as a file system or a network that is gone",
        )
        findings += found.get(number, [late])
    return findings


def attempt(call: Callable[[], T], seconds: float) -> tuple[T | None, str]:
    """The result of a call into the user's code, or None and why there is none."""
    results: list[T] = []

    def run() -> list[Finding]:
        results.append(call())
        return []

    findings = bounded("attempt", run, seconds)
    return (results[0], "") if results and not findings else (None, findings[0].text)
