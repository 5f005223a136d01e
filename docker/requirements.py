"""Writes the lists of packages that the image installs besides the project, one file per layer.

    python requirements.py PYPROJECT EXTRAS DIRECTORY

torch.txt is the large layer that rarely changes, rest.txt is the other one. A change of
pyproject.toml without a change of dependencies changes neither file, so both layers are reused.
"""

import re
import sys
import tomllib
from pathlib import Path


def main(pyproject: str, extras: str, directory: str) -> None:
    """Raises KeyError for an extra that the project does not have."""
    project = tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in filter(None, extras.split(",")):
        lines += project["optional-dependencies"][extra]
    is_torch = re.compile(r"torch\b(?!-)").match
    for name, chosen in (
        ("torch", [line for line in lines if is_torch(line)]),
        ("rest", [line for line in lines if not is_torch(line)]),
    ):
        (Path(directory) / f"{name}.txt").write_text("\n".join([*chosen, ""]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
