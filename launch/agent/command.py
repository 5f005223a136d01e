"""The commands that the agent starts as ranks: the training, and before it the doctor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from launch.contract import TRAIN_COMMANDS, python_module, safe_path_options


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


def is_doctor(command: Sequence[str]) -> bool:
    """Whether the command checks for a training instead of running it."""
    module, arguments = _module_of(rank_command(command))
    return module == "launch.doctor" or (module == "launch" and arguments[:1] == ["doctor"])


def _module_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The module that ``python -m MODULE ...`` runs, and its arguments; no module for another
    command. Python's options may be combined, as in ``-um train``, and some have a value."""
    rest = list(words[1:]) if Path(words[0]).name.startswith("python") else []
    while rest and rest[0].startswith("-"):
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
            return (value, rest) if option[1] == "m" else ("", [])
    return "", []


def doctor_command(level: str, training: Sequence[str]) -> list[str]:
    """The doctor, checking for this training command, which may be empty."""
    words = [*python_module("launch.doctor"), "--level", level]
    return [*words, "--", *training] if training else words
