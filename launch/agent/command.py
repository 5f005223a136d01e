"""The commands that the agent starts as ranks: the training, and before it the doctor."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from launch.contract import TRAIN_COMMANDS, UsageError, python_module, safe_path_options

_PYTHON = re.compile(r"python(\d+(\.\d+)*)?")


def rank_command(command: Sequence[str]) -> list[str]:
    """The command as it is started. ``isorun`` and ``python -m train`` run this very package, even
    if the working directory has a ``train.py``; any other command stays as it is."""
    words = list(command)
    if Path(words[0]).name == "isorun":
        package = "train" if words[1:2] and words[1] in TRAIN_COMMANDS else "launch"
        return [*python_module(package), *words[1:]]
    module, _ = _module_of(words)
    if module.partition(".")[0] in ("train", "launch"):
        return [words[0], *safe_path_options(), *words[1:]]
    return words


def refusal(reason: str) -> list[str]:
    """The command of ranks that only report why theirs cannot be started."""
    return [*python_module("launch.agent.refuse"), reason]


def is_doctor(command: Sequence[str]) -> bool:
    """Whether the command checks for a training instead of running it."""
    module, arguments = _module_of(rank_command(command))
    return module == "launch.doctor" or (module == "launch" and arguments[:1] == ["doctor"])


def check_startable(command: Sequence[str]) -> None:
    """Raises UsageError for a command that no rank could start: its program, or the module or
    script that Python shall run, does not exist. Imports nothing."""
    words = rank_command(command)
    program = words[0]
    if shutil.which(program) is None:
        if "/" not in program:
            why = "is not found in PATH"
        elif Path(program).is_dir():
            why = "is a directory"
        else:
            why = "is not executable" if Path(program).exists() else "does not exist"
        raise UsageError(f"The command after -- starts with {program!r}, which {why}; correct it.")
    kind, name, _ = _run_by_python(words)
    if kind == "script" and not Path(name).exists():
        raise UsageError(
            f"The command after -- runs {name!r}, which does not exist in {Path.cwd()}; correct "
            "it, or change the working directory."
        )
    if kind == "module" and program == sys.executable and not _is_found(name.partition(".")[0]):
        raise UsageError(
            f"The command after -- runs the module {name!r}, which {program} cannot find; correct "
            "it, or install its package."
        )


def _is_found(module: str) -> bool:
    """Whether Python finds a top-level module, also in the working directory; true where this
    process cannot tell."""
    if sys.flags.ignore_environment:  # the ranks may find it by PYTHONPATH
        return True
    try:
        found = find_spec(module)
    except (ValueError, ImportError):  # such as __main__
        return True
    return found is not None or PathFinder.find_spec(module, [""]) is not None


def _module_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The module that ``python -m MODULE ...`` runs, and its arguments; no module for another
    command."""
    kind, name, arguments = _run_by_python(words)
    return (name, arguments) if kind == "module" else ("", [])


def _run_by_python(words: Sequence[str]) -> tuple[str, str, list[str]]:
    """What a command of Python runs: its kind (module, script, or nothing of both), its name and
    its arguments. Python's options may be combined, as in ``-um train``, and some have a value."""
    rest = list(words[1:]) if _PYTHON.fullmatch(Path(words[0]).name) else []
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word.startswith("--"):
            del rest[: word == "--check-hash-based-pycs"]
            continue
        option = re.match(r"-[^cmWX]*([cmWX]?)(.*)", word)
        assert option
        if not option[1]:
            continue
        value = option[2] or (rest.pop(0) if rest else "")
        if option[1] in "cm":
            return ("module", value, rest) if option[1] == "m" and value else ("", "", [])
    return ("script", rest[0], rest[1:]) if rest and rest[0] != "-" else ("", "", [])


def doctor_command(level: str, training: Sequence[str]) -> list[str]:
    """The doctor, checking for this training command, which may be empty."""
    words = [*python_module("launch.doctor"), "--level", level]
    return [*words, "--", *training] if training else words
