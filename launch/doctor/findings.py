"""What a check says, and what all of it comes to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from launch.contract import Exit

ALL_NODES = "all nodes"


class Status(StrEnum):
    """How a check ended; only ``FAILED`` keeps a training from being started."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    """Its subject, in a word or two."""
    status: Status
    text: str
    """What is the case."""
    advice: str = ""
    """What to do; empty where there is nothing to do."""
    node: str = ""
    """Whose it is; empty until the node that found it puts its own name."""
    code: Exit = Exit.DONE
    """Of a failure: USAGE where a person has to change something, RETRY where a machine failed."""
    values: dict[str, Any] = field(default_factory=dict)
    """What was measured, with the unit in the name."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "status": str(self.status), "code": int(self.code)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Finding:
        """The inverse."""
        return cls(**{**values, "status": Status(values["status"]), "code": Exit(values["code"])})


def ok(check: str, text: str, *, node: str = "", **values: Any) -> Finding:
    """Nothing is wrong."""
    return Finding(check, Status.OK, text, node=node, values=values)


def skipped(check: str, text: str, *, node: str = "") -> Finding:
    """It was not looked at, for a reason."""
    return Finding(check, Status.SKIPPED, text, node=node)


def warning(check: str, text: str, advice: str, *, node: str = "", **values: Any) -> Finding:
    """A training can run, but perhaps not well."""
    return Finding(check, Status.WARNING, text, advice, node, values=values)


def misset(check: str, text: str, advice: str, *, node: str = "", **values: Any) -> Finding:
    """A setting is wrong, and to try again would not help."""
    return Finding(check, Status.FAILED, text, advice, node, Exit.USAGE, values)


def broken(check: str, text: str, advice: str, *, node: str = "", **values: Any) -> Finding:
    """The machine, the network or the storage failed."""
    return Finding(check, Status.FAILED, text, advice, node, Exit.RETRY, values)


def exit_code(findings: Iterable[Finding]) -> Exit:
    """A wrong setting wins over a machine that failed: it has to be changed in any case."""
    codes = {finding.code for finding in findings if finding.status is Status.FAILED}
    return next((code for code in (Exit.USAGE, Exit.RETRY) if code in codes), Exit.DONE)


def merged(findings: Sequence[Finding], nodes: Sequence[str]) -> list[Finding]:
    """What several nodes say alike as one finding, in the order of the first to say it."""
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
    """For people: of more than ``most`` nodes that are well in different words, only the first."""
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
            text = f"{finding.text} (and alike on {count - 1} more; --json has all)"
            kept.append(replace(finding, text=text))
        else:
            kept.append(finding)
    return kept
