"""Checks the words of a command line for isorun's components: TorchX reads ``--check maybe`` as
False, and prints its usage where isorun prints a sentence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, cast

from launch.contract import UsageError, did_you_mean, first_line

if TYPE_CHECKING:
    from torchx.specs import AppDef

_NAMES = ("fit", "doctor", "sweep", "tune", "run")


def component(name: str) -> Callable[..., AppDef]:
    """The component ``isorun.NAME``. Raises UsageError."""
    from launch.torchx import components

    known = {f"isorun.{n}": getattr(components, n) for n in _NAMES}
    if name not in known:
        raise UsageError(
            f"{name!r} is not a component of isorun{did_you_mean(name, known)} The components are "
            f"{', '.join(known)}."
        )
    return cast("Callable[..., AppDef]", known[name])


def check_words(
    name: str, words: Sequence[str], defaults: Mapping[str, str] | None = None, command: str = ""
) -> None:
    """Checks the words of a command line for the component ``name``. ``defaults`` are those of a
    ``.torchxconfig``. Raises UsageError; ``--help`` prints the help and exits."""
    from torchx.specs.builders import parse_args
    from torchx.util.types import decode, decode_optional

    function = component(name)
    output = StringIO()
    try:
        with redirect_stderr(output):
            given = parse_args(function, list(words), dict(defaults or {}))
    except SystemExit as leaving:
        if not leaving.code:  # --help
            raise
        why = output.getvalue().rpartition("error: ")[2].strip()
        raise UsageError(f"{name}: {why}; see `{command or 'torchx run'} {name} --help`.") from None
    for argument, parameter in inspect.signature(function).parameters.items():
        value, kind = getattr(given, argument), decode_optional(parameter.annotation)
        flag = f"-{argument}" if len(argument) == 1 else f"--{argument}"
        if kind is bool and str(value).lower() not in ("true", "false"):
            raise UsageError(f"{name}: {flag} must be True or False, but is {value!r}.")
        try:
            decode(value, kind)
        except ValueError as error:
            raise UsageError(
                f"{name}: {flag} must be KEY=VALUE,..., but is {value!r} ({first_line(error)})."
            ) from None
