"""The order of the checks: each node for itself, then node 0 compares, then all together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from launch.contract import BatchPlan
from launch.doctor.checks import (
    clocks,
    collectives,
    devices,
    environment,
    interfaces,
    memory,
    network,
    shared,
    storage,
    tracking,
    versions,
)
from launch.doctor.findings import ALL_NODES, Finding, Status, broken, misset, ok, skipped
from launch.doctor.guard import Check, bounded, bounded_together
from launch.doctor.meeting import Meeting
from launch.doctor.place import Place


@dataclass(frozen=True)
class Limits:
    """Seconds, after which what has not come to an end becomes a finding."""

    alone: float
    """All checks of a node for itself."""
    together: float
    """Each check between nodes."""

    @property
    def patience(self) -> float:
        """For the slowest of the others to come to the same point."""
        return max(self.alone, self.together) + 5.0

    @property
    def all(self) -> float:
        """The whole examination."""
        return self.alone + 8 * self.patience


LIMITS = {"quick": Limits(20.0, 20.0), "full": Limits(60.0, 60.0)}


class Examination:
    """The checks on this rank, and what they found so far."""

    def __init__(self, place: Place, meeting: Meeting, before: Iterable[Finding] = ()) -> None:
        self.place, self.meeting = place, meeting
        self.limits = LIMITS[place.level]
        self.node = meeting.label(meeting.rank)
        self.findings: list[Finding] = []
        self.note(before)

    def run(self) -> None:
        """All checks. Afterwards rank 0 has the findings of all ranks."""
        facts = self._alone() if self.place.leads else {}
        if len(self.meeting.leaders) > 1:
            self._between_nodes(facts)
        if self.meeting.rank == 0 and len(self.meeting.leaders) == 1:
            self._compare({0: facts})
        if self.place.world.world_size > 1:
            self._between_ranks(facts)
        self._gather()

    # -- each node for itself ------------------------------------------------------------------

    def _alone(self) -> dict[str, Any]:
        """The checks of one node; returns what is to be compared with other nodes."""
        place, facts = self.place, self._facts()
        checks: list[tuple[str, Check]] = [
            (devices.CHECK, partial(devices.check, place, facts["devices"])),
            ("interfaces", partial(environment.network_interfaces, place)),
            ("threads", partial(environment.threads, place)),
            ("limits", partial(environment.limits, place)),
            ("memory", partial(memory.memory, place)),
            ("shared memory", partial(memory.shared_memory, place)),
        ]
        if place.loaded is not None:
            checks.append(("run directory", partial(storage.writable, place.loaded)))
            if place.world.rank == 0:
                checks.append(("config", partial(_batches, place)))
                checks.append(("free space", partial(storage.room, place)))
                checks.append((tracking.CHECK, partial(tracking.check, place)))
        self.note(bounded_together(checks, self.limits.alone))
        if place.full and place.loaded is not None and not self._failed("run directory"):
            check = partial(storage.speed, place.loaded)
            self.note(bounded("disk speed", check, self.limits.alone))
        return facts

    def _facts(self) -> dict[str, Any]:
        loaded = self.place.loaded
        told = None if loaded is None else json.dumps(loaded.values(), sort_keys=True, default=str)
        return {
            "software": versions.software(loaded),
            "devices": devices.inventory(),
            "config": None if told is None else hashlib.sha256(told.encode()).hexdigest()[:12],
            "addresses": list(interfaces.addresses_of(self.place.environ)),
        }

    # -- between nodes -------------------------------------------------------------------------

    def _between_nodes(self, facts: dict[str, Any]) -> None:
        place, meeting, patience = self.place, self.meeting, self.limits.patience
        if not place.leads:
            return
        meeting.tell("facts", facts)
        if meeting.rank == 0:
            self._compare(meeting.hear("facts", meeting.leaders, patience))
        tried: dict[int, dict[int, network.Reached]] = {}

        def reach_others() -> list[Finding]:
            tried.update(network.check(place, meeting, patience))
            if meeting.rank != 0:
                return []
            return [
                *network.ports(tried, meeting.label),
                *network.names(tried, meeting.label),
                *clocks.compare(tried, meeting.label),
            ]

        seconds = 2 * patience + self.limits.together
        self.note(bounded(network.CHECK, reach_others, seconds), self.everybody)
        see_others = partial(shared.check, place, meeting, patience)
        self.note(bounded(shared.CHECK, see_others, seconds), self.everybody)

    def _compare(self, facts: dict[int, dict[str, Any]]) -> None:
        """On rank 0: whether all nodes are alike."""
        label = self.meeting.label
        software = {label(rank): found["software"] for rank, found in facts.items()}
        self.note(versions.compare(software), self.everybody)
        self.note(devices.compare({label(rank): found["devices"] for rank, found in facts.items()}))
        self.note(_configs({label(rank): found["config"] for rank, found in facts.items()}))
        if len(facts) > 1:
            members = self.meeting.members
            hosts = {members[rank].host: found["addresses"] for rank, found in facts.items()}
            self.note(environment.proxies(hosts))

    # -- between ranks -------------------------------------------------------------------------

    def _between_ranks(self, facts: dict[str, Any]) -> None:
        """Rank 0 decides whether a process group can be tried, and on what; all ranks follow."""
        place, meeting, limits = self.place, self.meeting, self.limits
        has_gpu = facts.get("devices", {}).get("count", 0) > 0
        meeting.tell("ready", {"gpu": has_gpu, "failed": self._failed("interfaces")})
        if meeting.rank == 0:
            ready = meeting.hear("ready", meeting.leaders, limits.patience)
            self._lost()
            meeting.tell("group", self._plan(ready))
        plan = meeting.hear("group", [0], limits.all).get(0)
        if plan is None or plan["why_not"]:
            if meeting.rank == 0 and plan:
                said = f"not tried: {plan['why_not']}"
                self.note([skipped(collectives.CHECK, said)], self.everybody)
            return

        def all_together() -> list[Finding]:
            return _collectives(place, meeting, plan["gpu"], limits.together)

        node = self.everybody if meeting.rank == 0 else self.node
        self.note(bounded(collectives.CHECK, all_together, 2 * limits.together), node)

    def _plan(self, ready: dict[int, Any]) -> dict[str, Any]:
        missing = self.place.world.world_size - len(self.meeting.members) + len(self.meeting.lost)
        why_not = ""
        if missing:
            why_not = f"{missing} rank(s) are missing"
        elif self._failed(network.CHECK):
            why_not = "the nodes do not reach each other"
        elif any(told["failed"] for told in ready.values()):
            why_not = "an interface that it would use does not exist"
        elif self._failed(devices.CHECK):
            why_not = "devices are missing"
        gpu = bool(ready) and all(told["gpu"] for told in ready.values())
        return {"why_not": why_not, "gpu": gpu}

    # -- bookkeeping ---------------------------------------------------------------------------

    def _gather(self) -> None:
        """Rank 0 hears what all others found, and puts it into the order of the checks."""
        meeting = self.meeting
        if meeting.rank != 0:
            meeting.tell("findings", [finding.to_json() for finding in self.findings])
            return
        others = [rank for rank in meeting.members if rank != 0]
        told = meeting.hear("findings", others, self.limits.patience)
        for findings in told.values():
            self.findings += map(Finding.from_json, findings)
        self._lost()
        order = list(dict.fromkeys(finding.check for finding in self.findings))
        self.findings.sort(key=lambda finding: order.index(finding.check))

    def _lost(self) -> None:
        """Names, once, the ranks that do not answer any more."""
        known = {finding.values.get("rank") for finding in self.findings}
        for rank, topic in sorted(self.meeting.lost.items()):
            if rank not in known:
                self.findings.append(
                    broken(
                        "ranks",
                        f"rank {rank} does not answer any more (asked for its {topic!r})",
                        "see its own output, and whether its node is still there",
                        node=self.meeting.label(rank),
                        rank=rank,
                    )
                )

    @property
    def everybody(self) -> str:
        """Whose a finding is that speaks of all nodes."""
        return self.node if len(self.meeting.leaders) == 1 else ALL_NODES

    def note(self, findings: Iterable[Finding], node: str | None = None) -> None:
        """Notes findings; those that name no node are ``node``'s, by default this one's."""
        whose = node or self.node
        self.findings += [f if f.node else replace(f, node=whose) for f in findings]

    def _failed(self, check: str) -> bool:
        return any(f.check == check and f.status is Status.FAILED for f in self.findings)


def absent(world_size: int, meeting: Meeting, seconds: float) -> list[Finding]:
    """On rank 0: the ranks that did not come."""
    missing = [str(rank) for rank in range(world_size) if rank not in meeting.members]
    if not missing:
        return []
    shown = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
    return [
        broken(
            "ranks",
            f"{len(missing)} of {world_size} ranks did not come within {seconds:g} s: {shown}",
            "see the output of their nodes; a node may have failed, or started late",
            node="absent",
        )
    ]


def _batches(place: Place) -> list[Finding]:
    assert place.loaded is not None
    plan = BatchPlan.from_config(place.loaded.config.batch, place.world.world_size)
    return [
        ok(
            "config",
            f"valid for {plan.world_size} rank(s): micro-batch "
            f"{plan.micro_batch_size or plan.largest_micro_batch} x accumulation "
            f"{plan.accumulation}, global batch {plan.global_batch_size}",
        )
    ]


def _configs(digests: dict[str, str | None]) -> list[Finding]:
    known = {node: digest for node, digest in digests.items() if digest is not None}
    usual = versions.usual_values({node: {"config": digest} for node, digest in known.items()})
    return [
        misset(
            "config",
            f"the resolved config has the digest {digest}, elsewhere {usual['config']}",
            "give all nodes the same config files, and the same environment where they refer to it",
            node=node,
        )
        for node, digest in known.items()
        if digest != usual["config"]
    ]


def _collectives(place: Place, meeting: Meeting, gpu: bool, seconds: float) -> list[Finding]:
    collectives.start_group(place, meeting, on_gpu=gpu, seconds=seconds)
    findings = collectives.correct(place, on_gpu=gpu)
    if not place.full:
        return findings
    nodes = len(meeting.leaders)
    findings += collectives.bandwidth(place, on_gpu=gpu, nodes=nodes)
    between = collectives.pairs(place, meeting, on_gpu=gpu) if nodes > 1 else {}
    computed = collectives.compute_rates(place, on_gpu=gpu)
    if place.world.rank != 0:
        return findings
    by_node = {
        leader: min(
            rate
            for rank, rate in computed.items()
            if meeting.members[rank].node == meeting.members[leader].node
        )
        for leader in meeting.leaders
    }
    slow = [
        *collectives.slow_ones(
            between, "exchanges data with other nodes", "GB/s", meeting.label,
            "see its network: link speed, duplex, errors (ethtool), and which interface is used",
        ),
        *collectives.slow_ones(
            by_node, "multiplies matrices", "GFLOP/s", meeting.label,
            "see what else runs on it, its clock (power, heat), and the limits of its container",
        ),
    ]  # fmt: skip
    if not slow and nodes > 1:
        pair, flops = min(between.values()) / 1e9, min(by_node.values()) / 1e9
        said = f"none: pairs exchange at least {pair:.3g} GB/s, each computes {flops:.3g} GFLOP/s"
        slow = [ok("slow node", said)]
    return findings + slow
