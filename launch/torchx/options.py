"""Checks a scheduler's options (``-cfg``), of which TorchX 0.7.0 ignores those it does not know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from launch.contract import UsageError, did_you_mean, first_line, user_path

if TYPE_CHECKING:
    from torchx.specs import runopts

_BOOL = ("true", "false")


def parse(text: str | None, known: runopts, scheduler: str, flag: str = "-cfg") -> dict[str, Any]:
    """The values of ``KEY=VALUE,...``. Raises UsageError."""
    from torchx.util.types import to_dict

    text = text or ""
    try:
        given = to_dict(text)
    except ValueError as error:
        raise _malformed(text, scheduler, flag, error) from None
    refuse_unknown(given, known, scheduler, f"{flag} {text}")
    for name, value in given.items():
        option = known.get(name)
        if option and option.opt_type is bool and value.lower() not in _BOOL:
            raise UsageError(f"{name} must be true or false, but is {value!r} ({flag} {text}).")
    try:
        values = dict(known.cfg_from_str(text))
    except (ValueError, IndexError) as error:  # IndexError: a map without :
        raise _malformed(text, scheduler, flag, error) from None
    # A shell leaves it in job_dir=~/x, and no option has another value of this form.
    homes = {name: v for name, v in values.items() if isinstance(v, str) and v.startswith("~")}
    return values | {
        name: str(user_path(value, f"{flag} {name} is {value!r}")) for name, value in homes.items()
    }


def refuse_unknown(names: Iterable[str], known: runopts, scheduler: str, origin: str) -> None:
    """Raises UsageError for a name that is not an option of the scheduler."""
    options = [name for name, _ in known]
    for name in names:
        if known.get(name) is None:
            raise UsageError(
                f"{name} is not an option of {scheduler} ({origin})"
                f"{did_you_mean(name, options)} The options are {', '.join(options)}."
            )


def _malformed(text: str, scheduler: str, flag: str, error: Exception) -> UsageError:
    return UsageError(
        f"{flag} must be KEY=VALUE,..., with values of the types that `torchx runopts {scheduler}` "
        f"lists, but is {text!r} ({first_line(error)})."
    )
