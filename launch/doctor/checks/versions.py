"""Whether all nodes run the same software."""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import launch
from launch.contract import (
    PACKAGES,
    LoadedConfig,
    code_version,
    package_versions,
    train_sources,
    train_version,
)
from launch.doctor.findings import Finding, misconfigured, ok

CHECK = "versions"


def software(loaded: LoadedConfig | None = None) -> dict[str, str]:
    """The versions on this node; "none" for a package that is not installed.

    The code's version is a digest of its files: it needs no git, and it differs after changes that
    are not committed.
    """
    found = {"isorun": train_version(), "code": _digest(_sources())}
    if loaded is not None and not loaded.task.__module__.startswith("train."):
        found["task"] = _digest([Path(inspect.getfile(loaded.task))])
    found["python"] = platform.python_version()
    return {**found, **dict.fromkeys(PACKAGES, "none"), **package_versions(PACKAGES)}


def _sources() -> list[Path]:
    assert launch.__file__
    roots = [train_sources(), Path(launch.__file__).parent]
    return sorted(path for root in roots for path in root.rglob("*.py"))


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def compare(nodes: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """A failure for each node with other versions than most nodes; ``nodes`` by label, node 0
    first."""
    usual = usual_values(nodes)
    findings = []
    for node, found in nodes.items():
        odd = differences(found, usual)
        if odd:
            findings.append(
                misconfigured(
                    CHECK,
                    in_words(odd),
                    "give all nodes the same image or environment, and the same code",
                    node=node,
                    **{name: mine for name, mine, _ in odd},
                )
            )
    if not findings:
        summary = ", ".join(f"{name} {value}" for name, value in usual.items() if value != "none")
        findings.append(ok(CHECK, summary + _commit(), **usual))
    return findings


def _commit() -> str:
    """Node 0's commit, if any. Not compared: it does not identify uncommitted changes."""
    code = code_version()
    if "commit" not in code:
        return ""
    return f", commit {code['commit'][:12]}{' with changes' if code['dirty'] else ''}"


def usual_values(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """For each name the value of most nodes; if several are equally frequent, the first node's."""
    names = dict.fromkeys(name for found in nodes.values() for name in found)
    return {
        name: Counter(found.get(name) for found in nodes.values()).most_common(1)[0][0]
        for name in names
    }


def differences(found: Mapping[str, Any], usual: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, this node's value, the usual value) for each name that differs."""
    return [
        (name, found.get(name, "none"), value if value is not None else "none")
        for name, value in usual.items()
        if found.get(name) != value
    ]


def in_words(odd: list[tuple[str, Any, Any]]) -> str:
    """Differences as text."""
    return "; ".join(f"{name} is {mine}, elsewhere {theirs}" for name, mine, theirs in odd)
