"""Writes the lists of packages that the image installs besides the project, one file per layer.

    python requirements.py PYPROJECT LOCK EXTRAS HASHES DIRECTORY

LOCK has all packages of all extras, with hashes; the lists have those that EXTRAS need. HASHES is
``required``, or ``none`` for wheels that were built elsewhere, whose hashes are others.

build.txt       setuptools, which builds the project and packages without wheels
torch-cpu.txt   torch alone; its wheel for CPUs is not on PyPI, so it has no hash
torch-cuda.txt  torch and the libraries of CUDA
rest.txt        everything else

A change of pyproject.toml without a change of dependencies changes no file, so layers are reused.
"""

import re
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

_CUDA = re.compile(r"torch|triton|nvidia-.*|cuda-.*")


@dataclass
class Package:
    """The entry of one version of a package."""

    requirement: str
    """Name, version and marker."""
    hashes: list[str] = field(default_factory=list)
    needed_by: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """As PyPI normalises it."""
        return normal(self.requirement)


def normal(requirement: str) -> str:
    """The name at the start of a requirement, as PyPI normalises it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", name[0] if name else "").lower()


def read(lock: str) -> list[Package]:
    """The entries of a lock file that ``uv pip compile --generate-hashes`` wrote."""
    packages: list[Package] = []
    for line in lock.splitlines():
        text = line.strip().removesuffix("\\").strip()
        if text.startswith("--hash="):
            packages[-1].hashes.append(text)
        elif line[:1].isalnum():
            packages.append(Package(text))
        elif packages and text.startswith("#"):  # "# via NAME", or a name a line below "# via"
            packages[-1].needed_by.add(normal(re.sub(r"^#\s*(via\s+)?", "", text)))
    return packages


def needed(packages: list[Package], roots: set[str]) -> list[Package]:
    """The entries that the roots need. Raises KeyError for a root that is not among them."""
    if missing := roots - {package.name for package in packages}:
        names = ", ".join(sorted(missing))
        raise KeyError(
            f"the lock file lacks {names}; add their extra to IMAGE_EXTRAS in the Makefile, then "
            "run `make lock`"
        )
    found, size = set(roots), 0
    while size < len(found):
        size = len(found)
        found |= {package.name for package in packages if package.needed_by & found}
    return [package for package in packages if package.name in found]


def main(pyproject: str, lock: str, extras: str, hashes: str, directory: str) -> None:
    """Raises KeyError for an extra that the project does not have."""
    if hashes not in ("required", "none"):
        raise ValueError(f"HASHES must be required or none, but is {hashes!r}")
    project = tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in filter(None, extras.split(",")):
        lines += project["optional-dependencies"][extra]
    packages = read(Path(lock).read_text(encoding="utf-8"))
    chosen = needed(packages, {normal(line) for line in lines} | {"setuptools"})
    cuda = [package for package in chosen if _CUDA.fullmatch(package.name)]
    with_hashes = hashes == "required"
    for name, listed, hashed in (
        ("build", [p for p in chosen if p.name == "setuptools"], with_hashes),
        ("torch-cpu", [p for p in cuda if p.name == "torch"], False),
        ("torch-cuda", cuda, with_hashes),
        ("rest", [p for p in chosen if p not in cuda], with_hashes),
    ):
        text = "--require-hashes\n" if hashed else ""
        for package in listed:
            words = [package.requirement, *(package.hashes if hashed else [])]
            text += " \\\n    ".join(words) + "\n"
        (Path(directory) / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
