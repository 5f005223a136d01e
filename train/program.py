"""How this process was called, and how to call others like it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def typed_command(name: str) -> list[str]:
    """The command line of another command, called like this process: by ``isorun``, or by a module
    of Python. An agent sets ISORUN_TYPED for its ranks, which it always starts by the module."""
    program = Path(sys.argv[0])
    if program.name == "isorun":
        return [_shortest(program.absolute()), name]
    if typed := os.environ.get("ISORUN_TYPED"):
        return [typed, name]
    is_launch = program.parts[-2:] == ("launch", "__main__.py")
    package = "launch" if is_launch else "train"
    # Without -P, `-m train` runs a train.py of the working directory.
    safe_path = ["-P"] if Path(f"{package}.py").exists() else []
    return [python(), *safe_path, "-m", package, name]


def python() -> str:
    """The shortest command that starts the Python interpreter of this process."""
    running = Path(sys.executable).with_name("python")
    return _shortest(running if running.exists() else Path(sys.executable))


def _shortest(program: Path) -> str:
    """The shortest command that starts a program: its name, if PATH leads to it."""
    found = shutil.which(program.name)
    if found and Path(found).absolute() == program:
        return program.name
    here = Path.cwd()
    return str(program.relative_to(here) if program.is_relative_to(here) else program)
