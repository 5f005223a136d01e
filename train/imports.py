"""Imports optional code: what users name by dotted path, and the libraries of extras."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.exits import UsageError, first_line

LIBRARIES = {"sklearn": "scikit-learn"}
"""Names on PyPI that differ from the module's name."""

_importing: list[str] = []


def import_class(reference: str, base: type, field: str) -> Any:
    """The class that ``module.path:Class`` names; the module may be in the working directory.

    ``field``: the config field that holds the reference, and its origin. Raises UsageError if
    there is no such module or class, or if it is not a subclass of ``base``. An error inside the
    user's module is not caught, because its traceback is useful.
    """
    found = _import(reference, field, "Class", lambda value: isinstance(value, type))
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(
            f"{field} names {reference!r}, which is not a subclass of "
            f"{base.__module__}.{base.__qualname__}."
        )
    return found


def import_function(reference: str, field: str) -> Any:
    """The function or class that ``module.path:name`` names; like ``import_class``."""
    found = _import(reference, field, "name", callable)
    if not callable(found):
        raise UsageError(
            f"{field} names {reference!r}, which is a {type(found).__name__} and cannot be called."
        )
    return found


def import_extra(module: str, extra: str, needed_by: str, alternative: str = "") -> Any:
    """A module of a library that only the extra ``isorun[extra]`` installs.

    Raises UsageError if the module cannot be imported. ``needed_by`` is the subject of the
    message, such as ``task.use=digits``; ``alternative`` is what works without the library.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise UsageError(
            f"{needed_by} needs {LIBRARIES.get(library, library)}, which cannot be imported "
            f"({first_line(error)}); install it with `pip install 'isorun[{extra}]'`"
            f"{alternative and f', or {alternative}'}."
        ) from error


@contextmanager
def import_path_restored() -> Iterator[None]:
    """Restores the places where this process looks for modules. An import by dotted path adds the
    working directory, where later imports of the caller's would find other modules."""
    before = sys.path[:]
    try:
        yield
    finally:
        sys.path[:] = before


def importing() -> str | None:
    """The user's module that is being imported by a dotted path now."""
    return _importing[-1] if _importing else None


def is_dotted_path(text: str) -> bool:
    """Whether a text has the form ``module.path:name``, the only one that is imported."""
    module, colon, name = text.partition(":")
    return bool(colon) and all(
        part.isidentifier() for part in [*module.split("."), *name.split(".")]
    )


def _import(reference: str, field: str, form: str, wanted: Callable[[Any], bool]) -> Any:
    """The object that the reference names; ``wanted`` selects the names to suggest. The working
    directory stays first in ``sys.path``: the module may import others later."""
    from train.suggest import did_you_mean

    module_name, _, name = reference.partition(":")
    if not is_dotted_path(reference):
        raise UsageError(f"{field} must have the form module.path:{form}, but is {reference!r}.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    _importing.append(module_name)
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
            f"{field} names the module {module_name!r}, which imports {missing!r}, but that is "
            "not installed."
        ) from None
    except SystemExit as error:
        raise UsageError(
            f"{field} names the module {module_name!r}, which calls sys.exit() when it is "
            f"imported (exit code {error.code!r}); put its main program under "
            '`if __name__ == "__main__":`.'
        ) from error
    finally:
        _importing.pop()
    found = getattr(module, name, None)
    if found is None and module_name == "__main__":
        raise UsageError(
            f"{field} names {reference!r}, which was defined in a notebook or an interactive "
            "session, so this process cannot import it; define it in a module."
        )
    if found is None:
        names = [key for key, value in vars(module).items() if wanted(value)]
        raise UsageError(
            f"{field} names {reference!r}, but {module_name} has no {name!r}"
            f"{did_you_mean(name, names)}"
        )
    return found
