"""Resolves ``task.use`` to a task class."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from inspect import getmembers, isfunction
from pathlib import Path

from train.exits import UsageError
from train.imports import import_class
from train.section import Section
from train.tasks.base import Task

BUILT_IN = {
    "autograd": "train.tasks.autograd.task:AutogradTask",
    "digits": "train.tasks.digits.task:DigitsTask",
    "text": "train.tasks.text.task:TextTask",
}
_OPTIMIZERS = ("build_optimizer", "build_optimizers", "configure_optimizers")
"""Methods with which tasks of other frameworks return optimisers."""


def find_task(reference: str, origin: str) -> type[Task]:
    """The task class for a built-in name or for ``module.path:Class``.

    The module may be in the working directory. ``origin`` is where ``task.use`` was set, for error
    messages. Raises UsageError if the name, module or class does not exist, if an import inside
    the module fails, or if the class is not a :class:`Task`.
    """
    field = f"task.use ({origin})"
    reference_or_name = BUILT_IN.get(reference, reference)
    if ":" not in reference_or_name:
        from train.suggest import did_you_mean

        raise UsageError(
            f"{field} must be one of {', '.join(BUILT_IN)} or a class written as "
            f"module.path:Class, but is {reference!r}{did_you_mean(reference, BUILT_IN)}"
        )
    try:
        found: type[Task] = import_class(reference_or_name, Task, field)
    except ImportError as error:
        raise UsageError(
            f"{field} names {reference!r}, but an import inside that module fails: {error}."
        ) from error
    check_task(found, f"{field} names {reference!r}")
    return found


def check_task(task: type[Task], subject: str) -> None:
    """Checks that a class implements the methods that a task must have, and that its sections are
    Sections. ``subject`` begins the message. Raises UsageError."""
    required = ("build_model", "train_dataset", "loss")
    missing = [name for name in required if getattr(task, name) is getattr(Task, name)]
    if missing:
        misspelt = [f" (it has {own}())" for own, name in _near_misses(task) if name in missing]
        raise UsageError(
            f"{subject}, which does not implement {', '.join(f'{name}()' for name in missing)}"
            f"{''.join(misspelt)}; a task needs {', '.join(f'{name}()' for name in required)}."
        )
    for name in _OPTIMIZERS:
        if hasattr(task, name):
            raise UsageError(
                f"{subject}, which has {name}(), but a run has one optimiser, that of optim.use, "
                "and one loss per step: several optimisers, as of a GAN, are out of scope; remove "
                "the method, set optim.use, and give parameters other settings with optim.groups."
            )
    for name in ("Options", "Model", "Data"):
        section = getattr(task, name)
        if not (isinstance(section, type) and issubclass(section, Section)):
            raise UsageError(
                f"{subject}, whose {name} is not a config section; write "
                f"`class {name}(train.Section)` inside the task, or rename it."
            )


def unused_methods(task: type[Task]) -> list[str]:
    """A warning for each method that isorun does not call, though its name is almost that of one
    which the task does not implement."""
    return [
        f"The task has a method {own}(), which isorun does not call; if it should be {name}(), "
        "correct its name."
        for own, name in _near_misses(task)
    ]


def _near_misses(task: type[Task]) -> list[tuple[str, str]]:
    inherited = [
        name
        for name, value in vars(Task).items()
        if isfunction(value) and getattr(task, name) is value
    ]
    public = [name for name, _ in getmembers(task, isfunction) if not name.startswith("_")]
    own = [name for name in public if not hasattr(Task, name)]
    found = {name: get_close_matches(name, inherited, n=1, cutoff=0.8) for name in own}
    return [(name, close[0]) for name, close in found.items() if close]


def reference_of(task: type[Task]) -> str:
    """What task.use must be for the command line to find a class that Python code has at hand.

    A class defined in a script is found under the script's file name. One that is defined in a
    notebook (module ``__main__`` without a file) cannot be found by other processes.
    """
    module = task.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        if spec is not None:  # python -m package.script
            module = spec.name
        elif file and Path(file).stem.isidentifier():
            module = Path(file).stem
    return f"{module}:{task.__qualname__}"
