"""Numbers in text that a user has written, such as the value of an environment variable."""

from __future__ import annotations

import math
from collections.abc import Mapping

from train.exits import UsageError


def whole_number(text: str) -> int | None:
    """The value of a text that has only the digits 0 to 9; None for any other text."""
    # str.isdigit also accepts characters that int() refuses, such as a superscript two, and int()
    # refuses thousands of digits.
    is_number = text.isascii() and text.isdigit() and len(text) < 20
    return int(text) if is_number else None


def port_number(text: str) -> int | None:
    """The value of a text that is a port, 1 to 65535; None for any other text."""
    port = whole_number(text)
    return port if port is not None and 1 <= port <= 65535 else None


def finite_number(text: str) -> float | None:
    """The value of a text that is a finite number; None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def whole_number_in(
    environ: Mapping[str, str], name: str, default: int, *, at_least: int = 0
) -> int:
    """The whole number in an environment variable of a launcher; the default if it is not set.
    Raises UsageError."""
    text = environ.get(name, "").strip()
    if not text:
        return default
    number = whole_number(text)
    if number is None or number < at_least:
        raise UsageError(
            f"{name} must be a whole number of at least {at_least}, but is {text!r} (environment); "
            "correct it, or start the run with torchrun."
        )
    return number


def seconds_in(environ: Mapping[str, str], name: str, where: str = "environment") -> float | None:
    """The seconds in an environment variable; None if it is not set. Raises UsageError."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    seconds = finite_number(text)
    if seconds is None or seconds <= 0:
        raise UsageError(f"{name} must be a number of seconds above 0, but is {text!r} ({where}).")
    return seconds
