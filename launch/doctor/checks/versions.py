"""Whether all nodes run the same software."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from launch.doctor.findings import Finding, misset, ok, warning
from train.rundir import code_version

CHECK = "versions"
_PACKAGES = ("torch", "accelerate", "deepspeed", "numpy")


def software() -> dict[str, str]:
    """What this node runs; a package that is not installed is "none"."""
    code = code_version()
    found = {"isorun": str(code["isorun"])}
    if "commit" in code:
        found["commit"] = code["commit"][:12] + (" with changes" if code["dirty"] else "")
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def compare(nodes: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """A failure for each node that runs something else than most; ``nodes`` by label, node 0
    first."""
    usual = usual_values(nodes)
    findings = []
    for node, found in nodes.items():
        odd = differences(found, usual)
        if odd:
            findings.append(
                misset(
                    CHECK,
                    "; ".join(
                        f"{name} is {mine}, elsewhere {theirs}" for name, mine, theirs in odd
                    ),
                    "give all nodes the same image or environment, and the same code",
                    node=node,
                    **{name: mine for name, mine, _ in odd},
                )
            )
    said = ", ".join(f"{name} {value}" for name, value in usual.items() if value != "none")
    if not findings:
        findings.append(ok(CHECK, said, node=", ".join(nodes), **usual))
    if "with changes" in usual.get("commit", "") and len(nodes) > 1:
        findings.append(
            warning(
                CHECK,
                "the code has changes that are not committed, and nodes can only be compared by "
                "their commits",
                "commit them, or see that all nodes have the same files",
            )
        )
    return findings


def usual_values(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of each name the value that most nodes have; of equally many, the first node's."""
    names = dict.fromkeys(name for found in nodes.values() for name in found)
    return {
        name: Counter(found.get(name) for found in nodes.values()).most_common(1)[0][0]
        for name in names
    }


def differences(found: Mapping[str, Any], usual: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, this node's value, the others') for each that differs."""
    return [
        (name, found.get(name, "none"), value if value is not None else "none")
        for name, value in usual.items()
        if found.get(name) != value
    ]
