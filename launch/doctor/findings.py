"""Findings, the results of checks, and the exit code of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from launch.contract import Exit

ALL_NODES = "all nodes"


class Status(StrEnum):
    """The result of a check; only ``FAILED`` prevents the start of a training."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    """The name of the check, one or two words."""
    status: Status
    text: str
    """The fact that was found."""
    advice: str = ""
    """What to do; empty if nothing."""
    node: str = ""
    """The label of the node; empty until the examination sets it."""
    code: Exit = Exit.DONE
    """Of a failure: USAGE if a setting must be changed, RETRY if infrastructure failed."""
    values: dict[str, Any] = field(default_factory=dict)
    """Measurements, with the unit in the name."""

    def to_json(self) -> dict[str, Any]:
        """The finding as plain values."""
        return {**asdict(self), "status": str(self.status), "code": int(self.code)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Finding:
        """The inverse of ``to_json``."""
        return cls(**{**values, "status": Status(values["status"]), "code": Exit(values["code"])})


def ok(check: str, text: str, *, node: str = "", **values: Any) -> Finding:
    """A check that passed."""
    return Finding(check, Status.OK, text, node=node, values=values)


def skipped(check: str, text: str, *, node: str = "") -> Finding:
    """A check that did not run; ``text`` is the reason."""
    return Finding(check, Status.SKIPPED, text, node=node)


def warning(check: str, text: str, advice: str, *, node: str = "", **values: Any) -> Finding:
    """A training can run, but may be slow or lose something."""
    return Finding(check, Status.WARNING, text, advice, node, values=values)


def misconfigured(check: str, text: str, advice: str, *, node: str = "", **values: Any) -> Finding:
    """A setting is wrong: a retry does not help."""
    return Finding(check, Status.FAILED, text, advice, node, Exit.USAGE, values)


def infrastructure_failure(
    check: str, text: str, advice: str, *, node: str = "", **values: Any
) -> Finding:
    """The machine, the network or the storage failed: a retry may help."""
    return Finding(check, Status.FAILED, text, advice, node, Exit.RETRY, values)


def exit_code(findings: Iterable[Finding]) -> Exit:
    """0, or the code of the failures: with both kinds USAGE, since a retry alone does not help."""
    codes = {finding.code for finding in findings if finding.status is Status.FAILED}
    return next((code for code in (Exit.USAGE, Exit.RETRY) if code in codes), Exit.DONE)


def merged(findings: Sequence[Finding], nodes: Sequence[str]) -> list[Finding]:
    """Combines equal findings of several nodes, in the order of their first occurrence."""
    groups: dict[tuple[Any, ...], list[Finding]] = {}
    for finding in findings:
        key = (finding.check, finding.status, finding.text, finding.advice, finding.code)
        groups.setdefault(key, []).append(finding)
    return [
        replace(alike[0], node=_together([finding.node for finding in alike], nodes))
        for alike in groups.values()
    ]


def _together(names: Sequence[str], nodes: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    if len(nodes) > 1 and set(nodes) <= set(names):
        return ALL_NODES
    return ", ".join(names)


def one_of_many(findings: Sequence[Finding], most: int = 4) -> list[Finding]:
    """For people: of more than ``most`` nodes that pass a check with different texts, only the
    first."""
    counts: dict[str, int] = {}
    for finding in findings:
        if finding.status is Status.OK:
            counts[finding.check] = counts.get(finding.check, 0) + 1
    kept, seen = [], set()
    for finding in findings:
        count = counts.get(finding.check, 0)
        if finding.status is Status.OK and count > most:
            if finding.check in seen:
                continue
            seen.add(finding.check)
            text = f"{finding.text} (and {count - 1} more nodes passed; see --json)"
            kept.append(replace(finding, text=text))
        else:
            kept.append(finding)
    return kept
