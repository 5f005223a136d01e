"""Refuses configs that hold secrets: a config is stored in the run directory and sent to W&B."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from train.config.leaves import Path, leaves, shown_path, value_at
from train.exits import UsageError
from train.secret_names import secret_variables
from train.secrets import (
    is_credential_name,
    is_secret_name,
    is_secret_value,
    is_secret_variable,
)

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)\s*(?:,\s*([^${}]*)\})?")
_SHORTEST = 8
"""Shorter values of secret variables may be in a config by chance."""
_LONG = 16
_STORED = "a config is stored in the run directory, logged and sent to W&B"


def check_no_secrets(raw: Any, values: Any, where: Callable[[str], str]) -> None:
    """Raises UsageError if a config has a secret.

    ``raw``: the values before ``${...}`` is resolved; ``where``: the origin of a dotted key.
    """
    secrets = secret_variables(os.environ)
    _check_keys(values, secrets, where)
    for path, value in leaves(raw):
        if isinstance(value, str) and "${" in value:
            for name in _secret_variables(value, value_at(values, path), secrets):
                key = shown_path(path)
                raise UsageError(
                    f"{key} refers to the environment variable {name} ({where(key)}), which holds "
                    f"a secret by its name, but {_STORED}; remove it: libraries find their "
                    "variables themselves, and a task can read os.environ."
                )
    for path, value in leaves(values):
        key, text = shown_path(path), _text(value)
        if is_secret_value(text):
            raise UsageError(
                f"{key} ({where(key)}) contains a secret, such as a password in a URL, a token or "
                f"a private key, but {_STORED}; remove it, and pass it in an environment variable "
                "that the storage's library or the task reads, or in a file."
            )
        if text and _is_below_credential(path):
            raise UsageError(
                f"{key} ({where(key)}) is a secret by its name, but {_STORED}; remove it, and pass "
                "it in an environment variable or in a file."
            )
        if variable := _pasted(text, secrets):
            raise UsageError(
                f"{key} ({where(key)}) contains the value of the environment variable {variable}, "
                f"which holds a secret by its name, but {_STORED}; remove it: libraries find their "
                "variables themselves, and a task can read os.environ."
            )


def _check_keys(
    values: Any, secrets: Mapping[str, str], where: Callable[[str], str], path: Path = ()
) -> None:
    """Raises UsageError if a key contains a secret. The error does not have the key."""
    if isinstance(values, Mapping):
        for name in map(_text, values):
            if is_secret_value(name) or _pasted(name, secrets):
                section = shown_path(path)
                place = f"of {section} ({where(section)})" if section else "of the config"
                raise UsageError(
                    f"A key {place} contains a secret, but {_STORED}; remove it, and pass it in an "
                    "environment variable or in a file."
                )
    if isinstance(values, Mapping | list):
        items = values.items() if isinstance(values, Mapping) else enumerate(values)
        for part, value in items:
            _check_keys(value, secrets, where, (*path, part))


def _is_below_credential(path: Path) -> bool:
    """Whether the key of a value, or of a section or a list that it is in, names a secret; below
    ``credentials``, a key such as ``file`` names a property of it."""
    names = [str(part) for part in path if type(part) is not int]
    last = names[-1:] or [""]
    return is_credential_name(last[0]) or any(
        is_credential_name(above) and is_credential_name(f"{above}_{last[0]}")
        for above in names[:-1]
    )


def _secret_variables(text: str, resolved: Any, secrets: Mapping[str, str]) -> Iterator[str]:
    """The variables with secret names that an interpolation uses: those that it names, and those
    whose values are in what it became, such as by ``${oc.env:${name}}``."""
    for name, default in _ENVIRONMENT.findall(text):
        value = os.environ.get(name) or _text(_default(default, resolved))
        if is_secret_variable(name, value) if value else is_secret_name(name):
            yield name
    texts = [_text(part) for path, value in leaves(resolved) for part in (*path, value)]
    parts = texts if isinstance(resolved, Mapping | list) else []  # of a decoded value
    parts = [part for part in parts if len(part) >= _SHORTEST]
    for name, value in secrets.items():
        if any(value in text for text in texts) or any(part in value for part in parts):
            yield name


def _default(written: str, resolved: Any) -> Any:
    """What a variable that is not set became: its default, or else the whole value, if it is no
    container."""
    default = written.strip().strip("'\"")
    if default:
        return None if default.lower() == "null" else default
    return None if isinstance(resolved, Mapping | list) else resolved


def _pasted(text: str, secrets: Mapping[str, str]) -> str | None:
    """The variable whose value a text is, or contains if it is long; None without one. Where only
    one word of the name could mean a secret, as in ``DATASET_KEY``, a value that looks like a path
    or a word is none."""
    for name, value in secrets.items():
        is_long = len(value) >= _LONG
        if text == value or (is_long and value in text):
            looks_random = is_long and not re.search(r"[\s/]", value) and re.search(r"\d", value)
            if is_credential_name(name) or looks_random:
                return name
    return None


def _text(value: Any) -> str:
    """A value as text; nothing for null, true and false."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None or isinstance(value, bool) else str(value)
