"""Classes of the user's that a config names in a list, with arguments for their constructor."""

from __future__ import annotations

import inspect
from typing import Any

from train.exits import UsageError
from train.imports import import_class
from train.section import ShortSection


class Plugin(ShortSection):
    """A class by dotted path. ``module:Class`` alone stands for ``{use: module:Class}``."""

    short_field = "use"
    short_form = "module:Class"
    short_schema = {"pattern": ":"}

    use: str
    """The dotted path of a class, such as my_project.hooks:Timer."""

    options: dict[str, Any] = {}
    """Keyword arguments for its constructor."""


def find_plugin(plugin: Plugin, base: type, field: str, *arguments: object) -> Any:
    """The class that a plugin names, a subclass of ``base``.

    ``arguments`` are what the constructor gets before the options, and ``field`` says where the
    plugin is set. Raises UsageError, also where the constructor does not take the options.
    """
    found = import_class(plugin.use, base, field)
    try:
        inspect.signature(found).bind(*arguments, **plugin.options)
    except TypeError as error:
        takes = list(inspect.signature(found).parameters)[len(arguments) :]
        listed = ", ".join(takes) if takes else "no options"
        raise UsageError(
            f"{field} names {plugin.use!r}, which does not accept the options "
            f"{plugin.options!r} ({error}); it takes {listed}."
        ) from None
    return found
