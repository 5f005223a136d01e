"""Refuses configs that hold secrets: a config is stored in the run directory and sent to W&B."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from train.exits import UsageError
from train.secrets import (
    is_credential_name,
    is_secret_name,
    is_secret_value,
    is_secret_variable,
)

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)")
_SHORTEST = 8
"""Shorter values of secret variables may be in a config by chance."""
_STORED = "a config is stored in the run directory, logged and sent to W&B"


def check_no_secrets(raw: Any, values: Any, where: Callable[[str], str]) -> None:
    """Raises UsageError if a config has a secret.

    ``raw``: the values before ``${...}`` is resolved; ``where``: the origin of a dotted key.
    """
    for key, value in leaves(raw):
        if isinstance(value, str) and "${" in value:
            for name in _secret_variables(value, _at(values, key)):
                raise UsageError(
                    f"{key} refers to the environment variable {name} ({where(key)}), which holds "
                    f"a secret by its name, but {_STORED}; remove it: libraries find their "
                    "variables themselves, and a task can read os.environ."
                )
    for key, value in leaves(values):
        if isinstance(value, str) and is_secret_value(value):
            raise UsageError(
                f"{key} ({where(key)}) contains a secret, such as a password in a URL, a token or "
                f"a private key, but {_STORED}; remove it, and pass it in an environment variable "
                "that the storage's library or the task reads, or in a file."
            )
        name = key.rpartition(".")[2]
        if isinstance(value, str) and value and is_credential_name(re.sub(r"\[\d+\]$", "", name)):
            raise UsageError(
                f"{key} ({where(key)}) is a secret by its name, but {_STORED}; remove it, and pass "
                "it in an environment variable or in a file."
            )


def _secret_variables(text: str, resolved: Any) -> Iterator[str]:
    """The variables with secret names that an interpolation uses: those that it names, and those
    whose values are in what it became, such as by ``${oc.env:${name}}``."""
    for name in _ENVIRONMENT.findall(text):
        value = os.environ.get(name)
        if is_secret_variable(name, value) if value else is_secret_name(name):
            yield name
    texts = [value for _, value in leaves(resolved) if isinstance(value, str)]
    for name, value in os.environ.items():
        if (
            len(value) >= _SHORTEST
            and is_secret_variable(name, value)
            and any(value in text for text in texts)
        ):
            yield name


def leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values that are no container, by dotted key; items of lists as ``key[0]``."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from leaves(value, f"{key}[{index}]")
    else:
        yield key, values


def _at(values: Any, wanted: str) -> Any:
    """The value, possibly a container, that an interpolation at a key of ``leaves`` became."""
    for part in re.findall(r"[^.\[\]]+|\[\d+\]", wanted):
        try:
            values = values[int(part[1:-1])] if part.startswith("[") else values[part]
        except (KeyError, IndexError, TypeError):
            return None
    return values
