"""Write a small project to start from: data, network, loss, metrics, config and a test.

The project can be trained at once. Replace its parts with your own, one by one.
"""

from __future__ import annotations

import argparse
import keyword
import re
import shlex
import sys
import unicodedata
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from string import Template

from train.exits import Exit, UsageError, first_line
from train.process.diagnose import fault_of
from train.program import python, typed_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("name", metavar="NAME", help="the directory to create, and its package")


def run(arguments: argparse.Namespace) -> Exit:
    """Writes the project and prints the next steps."""
    target = Path(arguments.name)
    name = target.name
    package = re.sub(r"\W", "_", name.lower())
    if (
        not re.fullmatch(r"\w[\w.\- ]*", name)
        or not package.isidentifier()
        or keyword.iskeyword(package)
        or package == "tests"
        or _is_module(package)
    ):
        raise UsageError(
            f"NAME is {arguments.name!r}, which gives no valid name of a new Python package; use "
            "letters, digits and underscores, start with a letter, and do not use the name of an "
            "installed module."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists already and is not empty; choose another NAME.")
    values = {
        "name": name,
        "package": package,
        "class_name": _camel(package),
        "distribution": _distribution(package),
    }
    try:
        written = _write(files("train") / "templates" / "project", target, values)
    except OSError as error:
        wrong = UsageError(
            f"{target} cannot be written ({first_line(error)}); choose another NAME."
        )
        raise fault_of(error, wrong) from None
    for path in written:
        print(path)
    print("\nNext:", *next_steps(target), sep="\n  ")
    return Exit.DONE


def next_steps(target: Path) -> list[str]:
    """The commands that install, train and test the project, as a shell takes them."""
    # A relative path would be wrong after cd.
    run = "python" if python() == "python" else shlex.quote(sys.executable)
    program, *words = typed_command("fit")
    if program == python():
        program = run
    elif "/" in program:
        program = shlex.quote(str(Path(program).absolute()))
    return [
        f"cd {shlex.quote(str(target))}",
        f"{run} -m pip install -e '.[dev]'",
        f"{program} {shlex.join(words)} --config config.yaml",
        f"{run} -m pytest",
    ]


def _is_module(name: str) -> bool:
    """Whether a module of this name can be imported; a plain directory does not count."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def _camel(package: str) -> str:
    return "".join(part.capitalize() for part in package.split("_") if part)


def _distribution(package: str) -> str:
    """A name that pip accepts: ASCII letters, digits and single hyphens."""
    ascii_only = unicodedata.normalize("NFKD", package).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-") or "project"


def _write(source: Traversable, target: Path, values: dict[str, str]) -> list[Path]:
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for entry in sorted(source.iterdir(), key=lambda item: item.name):
        if entry.is_dir():
            if entry.name == "__pycache__":
                continue
            folder = values["package"] if entry.name == "package" else entry.name
            written += _write(entry, target / folder, values)
        else:
            path = target / entry.name.removesuffix(".txt")
            text = Template(entry.read_text(encoding="utf-8")).substitute(values)
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written
