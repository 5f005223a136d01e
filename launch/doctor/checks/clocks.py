"""Whether the nodes' clocks show the same time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from launch.doctor.checks.network import Label, Reached
from launch.doctor.findings import Finding, infrastructure_failure, ok, warning

CHECK = "clocks"
NOTICEABLE = 1.0  # seconds; above it the logs of nodes cannot be compared
REFUSED = 300.0  # seconds; above it object storage and certificates reject requests


def compare(tried: Mapping[int, Mapping[int, Reached]], label: Label) -> list[Finding]:
    """How much each node's clock differs from the median.

    Each node has read node 0's clock, with an uncertainty of half a round trip.
    """
    ahead, unsure = {0: 0.0}, 0.0
    for source, targets in tried.items():
        if source != 0 and 0 in targets and not targets[0].error:
            ahead[source] = -targets[0].ahead
            unsure = max(unsure, targets[0].round_trip / 2)
    if len(ahead) < 2:
        return []  # no node reaches node 0, which is a finding of its own
    middle = statistics.median(ahead.values()) if len(ahead) > 2 else 0.0
    findings = []
    for node, seconds in ahead.items():
        off = seconds - middle
        if abs(off) - unsure > NOTICEABLE:
            than = "most others'" if len(ahead) > 2 else f"{label(0)}'s"
            kind = infrastructure_failure if abs(off) > REFUSED else warning
            findings.append(
                kind(
                    CHECK,
                    f"the clock is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} {than}",
                    "start time synchronisation (chrony, systemd-timesyncd) on this node",
                    node=label(node),
                    ahead_seconds=off,
                )
            )
    if findings:
        return findings
    most = max(abs(seconds - middle) for seconds in ahead.values())
    return [
        ok(
            CHECK,
            f"within {most * 1e3:.2f} ms of each other, measured to within {unsure * 1e3:.2f} ms",
            most_seconds=most,
            unsure_seconds=unsure,
        )
    ]
