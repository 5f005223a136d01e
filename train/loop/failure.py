"""The exit code and text of an error that ends a run, for the parts that report it."""

from __future__ import annotations

from collections.abc import Callable

from train.exits import Exit, first_line
from train.process.diagnose import as_run_error
from train.process.stop_signals import is_of_signal
from train.secrets import redact


def on_error(report: Callable[[Exit, str], None]) -> Callable[..., None]:
    """An exit for an ``ExitStack`` that calls ``report`` with the exit code and the text of the
    error that ends the run; without an error it calls nothing."""

    def leave(kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is not None:
            report(*described(error))

    return leave


def described(error: BaseException) -> tuple[Exit, str]:
    """The exit code and the text of an error that ends a run, without secrets."""
    if is_of_signal(error):
        return Exit.STOPPED_AT_ONCE, "Stopped at once, without saving."
    known = as_run_error(error)
    if known:
        return known.code, redact(str(known))
    return Exit.INTERNAL, redact(f"{type(error).__name__}: {first_line(error)}")
