"""The file that a report is written to."""

from __future__ import annotations

from pathlib import Path

from train.exits import RunError, UsageError
from train.files import read_bytes, refuse_irregular, replace_text
from train.process.diagnose import fault_of

_START = b"<!doctype html>"


def check_target(target: Path) -> None:
    """Raises UsageError for a file that is no report, which must not be replaced."""
    try:
        refuse_irregular(target)
        if target.exists() and not _is_report(target):
            raise UsageError(
                f"--to is {str(target)!r}, which exists and is no report; choose another file."
            )
    except OSError as error:
        raise _unwritable(target, error) from None


def _is_report(target: Path) -> bool:
    head = read_bytes(target)[: len(_START)]
    return not head or head.lower() == _START


def write_report(target: Path, page: str) -> None:
    """Writes a page atomically. Raises UsageError if it cannot be written there, and RetryError
    for a fault of the machine, such as a full disk."""
    try:
        replace_text(target, page)
    except OSError as error:
        raise _unwritable(target, error) from None


def _unwritable(target: Path, error: OSError) -> RunError:
    wrong = UsageError(
        f"--to is {str(target)!r}, which cannot be written: {error.strerror or error}; choose "
        "another file."
    )
    return fault_of(error, wrong)
