"""The commands that the agent starts as ranks: the training, and before it the doctor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.contract import TRAIN_COMMANDS, python_module


def rank_command(command: Sequence[str]) -> list[str]:
    """The command as it is started. ``isorun`` and ``python -m train`` run this very package, even
    if the working directory has a ``train.py``; any other command stays as it is."""
    words = list(command)
    program = Path(words[0]).name
    if program == "isorun":
        package = "train" if words[1:2] and words[1] in TRAIN_COMMANDS else "launch"
        return [*python_module(package), *words[1:]]
    if program.startswith("python") and "-m" in words[:-1]:
        at = words.index("-m")
        package = words[at + 1].partition(".")[0]
        if package in ("train", "launch") and all(word.startswith("-") for word in words[1:at]):
            _, *safe, _, _ = python_module(package)
            return [words[0], *safe, *words[1:]]
    return words


def doctor_command(level: str, training: Sequence[str]) -> list[str]:
    """The doctor, checking for this training command, which may be empty."""
    words = [*python_module("launch.doctor"), "--level", level]
    return [*words, "--", *training] if training else words
