"""The order of the checks: each node alone, then node 0 compares, then all nodes together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from launch.doctor.checks import (
    clocks,
    collectives,
    config,
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
from launch.doctor.findings import ALL_NODES, Finding, Status, infrastructure_failure, skipped
from launch.doctor.guard import Check, bounded, bounded_together
from launch.doctor.place import Place
from launch.doctor.rendezvous import Rendezvous


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds; a check that exceeds one becomes a finding."""

    alone: float
    """All checks of one node."""
    together: float
    """Each check between nodes."""

    @property
    def patience(self) -> float:
        """How long a rank waits for the slowest other one at the same point."""
        return max(self.alone, self.together) + 5.0

    @property
    def all(self) -> float:
        """The whole examination."""
        return self.alone + 8 * self.patience


LIMITS = {"quick": Limits(20.0, 20.0), "full": Limits(60.0, 60.0)}


class Examination:
    """The checks on this rank, and their findings so far."""

    def __init__(
        self, place: Place, rendezvous: Rendezvous, before: Iterable[Finding] = ()
    ) -> None:
        self.place, self.rendezvous = place, rendezvous
        self.limits = LIMITS[place.level]
        self.node = rendezvous.label(rendezvous.rank)
        self.findings: list[Finding] = []
        self.note(before)

    def run(self) -> None:
        """Runs all checks. Afterwards rank 0 has the findings of all ranks."""
        facts = self._alone() if self.place.leads else {}
        if len(self.rendezvous.leaders) > 1:
            self._between_nodes(facts)
        if self.rendezvous.rank == 0 and len(self.rendezvous.leaders) == 1:
            self._compare({0: facts})
        if self.place.world.world_size > 1:
            self._between_ranks(facts)
        self._gather()

    # -- one node ------------------------------------------------------------------------------

    def _alone(self) -> dict[str, Any]:
        """The checks of this node; returns the facts to compare with other nodes."""
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
                checks.append((config.CHECK, partial(config.batches, place)))
                checks.append(("free space", partial(storage.room, place)))
                checks.append((tracking.CHECK, partial(tracking.check, place)))
        self.note(bounded_together(checks, self.limits.alone))
        if place.full and place.loaded is not None and not self._failed("run directory"):
            check = partial(storage.speed, place.loaded)
            self.note(bounded("disk speed", check, self.limits.alone))
        return facts

    def _facts(self) -> dict[str, Any]:
        loaded = self.place.loaded
        return {
            "software": versions.software(loaded),
            "devices": devices.inventory(),
            "config": config.digest(loaded),
            "addresses": list(interfaces.addresses_of(self.place.environ)),
        }

    # -- between nodes -------------------------------------------------------------------------

    def _between_nodes(self, facts: dict[str, Any]) -> None:
        place, rendezvous, patience = self.place, self.rendezvous, self.limits.patience
        if not place.leads:
            return
        rendezvous.publish("facts", facts)
        if rendezvous.rank == 0:
            self._compare(rendezvous.collect("facts", rendezvous.leaders, patience))
        tried: dict[int, dict[int, network.Reached]] = {}

        def reach_others() -> list[Finding]:
            tried.update(network.check(place, rendezvous, patience))
            if rendezvous.rank != 0:
                return []
            return [
                *network.ports(tried, rendezvous.label),
                *network.names(tried, rendezvous.label),
                *clocks.compare(tried, rendezvous.label),
            ]

        seconds = 2 * patience + self.limits.together
        self.note(bounded(network.CHECK, reach_others, seconds), self.everybody)
        see_others = partial(shared.check, place, rendezvous, patience)
        self.note(bounded(shared.CHECK, see_others, seconds), self.everybody)

    def _compare(self, facts: dict[int, dict[str, Any]]) -> None:
        """On rank 0: whether all nodes are alike."""
        label = self.rendezvous.label
        software = {label(rank): found["software"] for rank, found in facts.items()}
        self.note(versions.compare(software), self.everybody)
        self.note(devices.compare({label(rank): found["devices"] for rank, found in facts.items()}))
        self.note(config.compare({label(rank): found["config"] for rank, found in facts.items()}))
        if len(facts) > 1:
            members = self.rendezvous.members
            hosts = {members[rank].host: found["addresses"] for rank, found in facts.items()}
            self.note(environment.proxies(hosts))

    # -- between ranks -------------------------------------------------------------------------

    def _between_ranks(self, facts: dict[str, Any]) -> None:
        """Rank 0 decides whether to start a process group, and on which devices."""
        place, rendezvous, limits = self.place, self.rendezvous, self.limits
        has_gpu = facts.get("devices", {}).get("count", 0) > 0
        rendezvous.publish("ready", {"gpu": has_gpu, "failed": self._failed("interfaces")})
        if rendezvous.rank == 0:
            ready = rendezvous.collect("ready", rendezvous.leaders, limits.patience)
            self._note_lost()
            rendezvous.publish("group", self._plan(ready))
        plan = rendezvous.collect("group", [0], limits.all).get(0)
        if plan is None or plan["why_not"]:
            if rendezvous.rank == 0 and plan:
                text = f"skipped because {plan['why_not']}"
                self.note([skipped(collectives.CHECK, text)], self.everybody)
            return

        def all_together() -> list[Finding]:
            return collectives.check(place, rendezvous, on_gpu=plan["gpu"], seconds=limits.together)

        node = self.everybody if rendezvous.rank == 0 else self.node
        self.note(bounded(collectives.CHECK, all_together, 2 * limits.together), node)

    def _plan(self, ready: dict[int, Any]) -> dict[str, Any]:
        lost = len(self.rendezvous.lost)
        missing = self.place.world.world_size - len(self.rendezvous.members) + lost
        why_not = ""
        if missing:
            why_not = f"{missing} rank(s) are missing"
        elif self._failed(network.CHECK):
            why_not = "the nodes cannot reach each other"
        elif any(answer["failed"] for answer in ready.values()):
            why_not = "an interface that it needs does not exist"
        elif self._failed(devices.CHECK):
            why_not = "devices are missing"
        gpu = bool(ready) and all(answer["gpu"] for answer in ready.values())
        return {"why_not": why_not, "gpu": gpu}

    # -- bookkeeping ---------------------------------------------------------------------------

    def _gather(self) -> None:
        """Rank 0 collects the findings of all ranks, and sorts them by check."""
        rendezvous = self.rendezvous
        if rendezvous.rank != 0:
            rendezvous.publish("findings", [finding.to_json() for finding in self.findings])
            return
        others = [rank for rank in rendezvous.members if rank != 0]
        collected = rendezvous.collect("findings", others, self.limits.patience)
        for findings in collected.values():
            self.findings += map(Finding.from_json, findings)
        self._note_lost()
        order = list(dict.fromkeys(finding.check for finding in self.findings))
        self.findings.sort(key=lambda finding: order.index(finding.check))

    def _note_lost(self) -> None:
        """Adds a finding for each rank that stopped answering, once."""
        known = {finding.values.get("rank") for finding in self.findings}
        for rank, topic in sorted(self.rendezvous.lost.items()):
            if rank not in known:
                self.findings.append(
                    infrastructure_failure(
                        "ranks",
                        f"rank {rank} stopped answering (waited for its {topic!r})",
                        "check its log, and whether its node is still running",
                        node=self.rendezvous.label(rank),
                        rank=rank,
                    )
                )

    @property
    def everybody(self) -> str:
        """The node of a finding about all nodes."""
        return self.node if len(self.rendezvous.leaders) == 1 else ALL_NODES

    def note(self, findings: Iterable[Finding], node: str | None = None) -> None:
        """Adds findings; those without a node get ``node``, by default this one."""
        node = node or self.node
        self.findings += [f if f.node else replace(f, node=node) for f in findings]

    def _failed(self, check: str) -> bool:
        return any(f.check == check and f.status is Status.FAILED for f in self.findings)


def absent(world_size: int, rendezvous: Rendezvous, seconds: float) -> list[Finding]:
    """On rank 0: a finding about the ranks that did not join, if any."""
    missing = [str(rank) for rank in range(world_size) if rank not in rendezvous.members]
    if not missing:
        return []
    shown = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
    return [
        infrastructure_failure(
            "ranks",
            f"{len(missing)} of {world_size} ranks did not join within {seconds:g} s: {shown}",
            "check the logs of their nodes; a node may have failed or started late",
            node="absent",
        )
    ]
