"""Finds classes that users name by dotted path, from any directory, with clear errors."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from train.exits import UsageError


def import_class(reference: str, base: type, field: str) -> Any:
    """The class that ``module.path:Class`` names; a module may lie in the working directory.

    ``field`` says which config field holds the reference and where it was set. Raises
    UsageError where there is no such module or class, or it is no subclass of ``base``; an
    error inside the user's module is passed on as what it is, since its traceback is useful.
    """
    from train.suggest import did_you_mean

    module_name, colon, class_name = reference.partition(":")
    if not colon or not module_name or not class_name or module_name.startswith("."):
        raise UsageError(f"{field} must have the form module.path:Class, but is {reference!r}.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(missing + "."):
            raise UsageError(
                f"{field} names the module {module_name!r}, but {missing!r} is neither "
                f"installed nor in the working directory {here}."
            ) from None
        raise UsageError(
            f"{field} names the module {module_name!r}, which itself imports {missing!r}, and "
            "that is not installed."
        ) from None
    found = getattr(module, class_name, None)
    if found is None:
        names = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise UsageError(
            f"{field} names {reference!r}, but {module_name} has no {class_name!r}"
            f"{did_you_mean(class_name, names)}"
        )
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(
            f"{field} names {reference!r}, which is no subclass of "
            f"{base.__module__}.{base.__qualname__}."
        )
    return found
