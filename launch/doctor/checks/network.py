"""Whether every node can connect to every other one, and how their clocks differ."""

from __future__ import annotations

import secrets
import socket
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from launch.contract import finite_number, first_line, listen
from launch.doctor.checks.interfaces import addresses_of, is_loopback
from launch.doctor.findings import Finding, infrastructure_failure, misconfigured, ok, warning
from launch.doctor.place import Place
from launch.doctor.rendezvous import Rendezvous

CHECK = "network"
CONNECT_SECONDS = 3.0
_PINGS = 5
_AT_ONCE = 32
_CONNECTIONS = 256
"""That a listener serves at the same time; further ones wait, since anybody may connect."""
_LONGEST_ANSWER = 100  # characters
SLOW_NAME = 1.0  # seconds


class Listener:
    """Answers on a port of its own with its token and the time of its clock, until the process
    ends. It listens at the address, or at all addresses if it is empty.

    A connection gets as many answers as ``ask`` needs, within a time limit.
    """

    def __init__(self, address: str = "", clock: Callable[[], float] = time.time) -> None:
        self.token = secrets.token_hex(8)
        self._clock = clock
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        self._server = listen(address, 0)
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._serve, name="listener", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._free.acquire()
            connection, _ = self._server.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(CONNECT_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for _ in range(_PINGS):
                    if not connection.recv(1):
                        break
                    connection.sendall(f"{self.token} {self._clock():.6f}\n".encode())
        except OSError:
            pass  # the other side has gone
        finally:
            self._free.release()


@dataclass(frozen=True)
class Reached:
    """The attempt of one node to connect to another."""

    error: str = ""
    """Why it failed; empty if it did not."""
    address: str = ""
    loopback: bool = False
    """Whether the address that failed is one that only the other host itself can use."""
    round_trip: float = 0.0
    """Seconds, the shortest of several."""
    ahead: float = 0.0
    """Seconds that the other clock is ahead of this one."""
    name_error: str = ""
    """Why the other's host name did not resolve; empty if it did."""
    name_seconds: float = 0.0


def ask(
    address: str, port: int, token: str, clock: Callable[[], float] = time.time
) -> tuple[float, float]:
    """(round trip, seconds that the other's clock is ahead) of the listener at an address.

    The request with the shortest round trip counts: the clock was read within it, on average in
    its middle (Cristian, Probabilistic clock synchronization, 1989). Raises OSError if nothing or
    something else answers.
    """
    with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = connection.makefile("r", encoding="ascii", errors="replace")
        answers = []
        for _ in range(_PINGS):
            started, shown = time.perf_counter(), clock()
            connection.sendall(b"?")
            words = reader.readline(_LONGEST_ANSWER).split()
            took = time.perf_counter() - started
            if len(words) != 2 or words[0] != token:
                raise OSError("something else answers there")
            theirs = finite_number(words[1])
            if theirs is None:
                raise OSError("something else answers there")
            answers.append((took, theirs - (shown + took / 2)))
    return min(answers)


def reach(host: str, listener: Mapping[str, Any], *, resolve: bool) -> Reached:
    """Connects to all addresses of another node, and resolves its name; stops at a failure."""
    name_error, name_seconds = "", 0.0
    if resolve:
        started = time.monotonic()
        try:
            socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            name_error = error.strerror or str(error)
        name_seconds = time.monotonic() - started
    answers = []
    for address in listener["addresses"]:
        try:
            answers.append((*ask(address, listener["port"], listener["token"]), address))
        except OSError as error:
            why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
            return Reached(
                first_line(OSError(why)), f"{address}:{listener['port']}", is_loopback(address),
                name_error=name_error, name_seconds=name_seconds,
            )  # fmt: skip
    round_trip, ahead, address = min(answers)
    return Reached(
        "", address, False, round_trip, ahead, name_error=name_error, name_seconds=name_seconds
    )


def check(place: Place, rendezvous: Rendezvous, patience: float) -> dict[int, dict[int, Reached]]:
    """Called on the first rank of each node: each connects to each other one.

    Returns, on rank 0, the attempts of each node; nodes are given by their first ranks.
    """
    addresses = addresses_of(place.environ)
    here = Listener(next(iter(addresses)) if len(addresses) == 1 else "")
    rendezvous.publish(
        "listener",
        {"addresses": list(addresses), "why": addresses, "port": here.port, "token": here.token},
    )
    listeners = rendezvous.collect("listener", rendezvous.leaders, patience)
    listeners.pop(rendezvous.rank, None)

    def try_to_reach(rank: int) -> Reached:
        host = rendezvous.members[rank].host
        return reach(host, listeners[rank], resolve=host != place.world.host)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        reached = dict(zip(listeners, pool.map(try_to_reach, listeners), strict=True))
    rendezvous.publish("reached", {rank: asdict(result) for rank, result in reached.items()})
    if rendezvous.rank != 0:
        return {}
    attempts = rendezvous.collect("reached", rendezvous.leaders, patience)
    return {
        source: {int(target): Reached(**values) for target, values in targets.items()}
        for source, targets in attempts.items()
    }


Tried = Mapping[int, Mapping[int, Reached]]
Label = Callable[[int], str]


def ports(tried: Tried, label: Label) -> list[Finding]:
    """Which nodes cannot be reached, from where, and at which address."""
    failures = {
        (source, target): result
        for source, targets in tried.items()
        for target, result in targets.items()
        if result.error
    }
    if not failures:
        return [_all_reached(tried, label)]
    # With three nodes or more: a node that reaches no other one is itself the cause.
    cut_off = {
        source
        for source, targets in tried.items()
        if len(targets) > 1 and all(result.error for result in targets.values())
    }
    findings = []
    for source in sorted(cut_off):
        example = next(iter(tried[source].values()))
        findings.append(
            _unreachable(source, label, "reaches no other node, such as {at}", example, "")
        )
    for target in sorted({target for _, target in failures}):
        sources = [s for s, t in failures if t == target and s not in cut_off]
        if sources:
            names = ", ".join(label(source) for source in sources)
            findings.append(
                _unreachable(
                    target, label, "cannot be reached at {at} from {names}",
                    failures[sources[0], target], names,
                )
            )  # fmt: skip
    return findings


def _unreachable(node: int, label: Label, text: str, result: Reached, names: str) -> Finding:
    summary = f"{text.format(at=result.address, names=names)} ({result.error})"
    if result.loopback:
        return misconfigured(
            CHECK,
            f"{summary}: it gives the others an address that only it can use",
            "set GLOO_SOCKET_IFNAME to the interface that the nodes share, or correct the address "
            "of the host's name (/etc/hosts)",
            node=label(node),
        )
    return infrastructure_failure(
        CHECK,
        summary,
        "open all TCP ports between the nodes (firewall, security group, network policy), or "
        "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that they share",
        node=label(node),
    )


def _all_reached(tried: Tried, label: Label) -> Finding:
    trips = {
        (source, target): result.round_trip
        for source, targets in tried.items()
        for target, result in targets.items()
    }
    slowest = max(trips, key=lambda pair: trips[pair])
    median = statistics.median(trips.values())
    return ok(
        CHECK,
        f"{len(tried)} nodes reach each other; round trip {median * 1e3:.2f} ms, the slowest "
        f"{trips[slowest] * 1e3:.2f} ms ({label(slowest[0])} to {label(slowest[1])})",
        round_trip_seconds=median,
        slowest_round_trip_seconds=trips[slowest],
    )


def names(tried: Tried, label: Label) -> list[Finding]:
    """Host names that do not resolve, or resolve slowly."""
    findings = []
    for source, targets in tried.items():
        unknown = [label(target) for target, result in targets.items() if result.name_error]
        slow = [r.name_seconds for r in targets.values() if r.name_seconds > SLOW_NAME]
        if unknown:
            why = next(result.name_error for result in targets.values() if result.name_error)
            findings.append(
                warning(
                    "names",
                    f"does not resolve {', '.join(unknown[:4])}"
                    f"{f' and {len(unknown) - 4} more' if len(unknown) > 4 else ''} ({why})",
                    "a run needs only the name of node 0; for tools that need other names, add "
                    "them to DNS or /etc/hosts",
                    node=label(source),
                )
            )
        if slow:
            findings.append(
                warning(
                    "names",
                    f"takes up to {max(slow):.1f} s to resolve a name",
                    "fix the resolver (/etc/resolv.conf): each connection waits for it",
                    node=label(source),
                )
            )
    return findings
