"""The bounds of the dependencies in pyproject.toml are versions that were tested."""

import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.runs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(*extras):
    """The direct requirements, without isorun's own extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [r for r in map(Requirement, lines) if r.name != "isorun"]


def bounds(requirement):
    return {s.operator: s.version for s in requirement.specifier}


def test_every_dependency_has_a_lower_bound():
    assert [r.name for r in requirements(*EXTRAS) if ">=" not in bounds(r)] == []


def test_the_pinned_versions_are_within_the_bounds():
    """Every direct dependency is pinned."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): number for name, number in pinned.items()}
    for requirement in requirements(*EXTRAS):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), (
            requirement
        )
