"""Write a small project of your own to start from: data, network, loss, metrics, config, test.

The project trains as it is; replace its parts one by one.
"""

from __future__ import annotations

import argparse
import keyword
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from string import Template

from train.exits import Exit, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("name", metavar="NAME", help="the directory to make, and the package in it")


def run(arguments: argparse.Namespace) -> Exit:
    """Writes the project and says what to do next."""
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
            f"NAME is {arguments.name!r}, from which no name of a new Python package can be made; "
            "use letters, digits and underscores, begin with a letter, and avoid the names of "
            "modules that there are."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists already and is not empty; choose another NAME.")
    values = {"name": name, "package": package, "class_name": _camel(package)}
    try:
        written = _write(files("train") / "templates" / "project", target, values)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error}; choose another NAME.") from None
    for path in written:
        print(path)
    print(f"\nNext:\n  cd {target}\n  python -m train fit --config config.yaml\n  python -m pytest")
    return Exit.DONE


def _is_module(name: str) -> bool:
    """Whether Python would find a module of this name, other than a plain directory."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def _camel(package: str) -> str:
    return "".join(part.capitalize() for part in package.split("_") if part)


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
            path.write_text(Template(entry.read_text(encoding="utf-8")).substitute(values))
            written.append(path)
    return written
