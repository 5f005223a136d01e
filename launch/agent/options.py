"""The agent's options, read from its command line and environment and checked."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from launch import deadlines
from launch.agent.arguments import PREFLIGHTS, TERMINATION_LOG, Values, read, training
from launch.agent.quiet_torch import import_torch
from launch.contract import (
    RUN_ID,
    STOP_DEADLINE,
    UsageError,
    did_you_mean,
    first_host,
    key_value,
    port_number,
    read_secret,
    seconds_in,
    threads_per_process,
    whole_number,
)
from launch.ports import DEFAULT_PORT

# Where launchers put the number of this node: TorchX, Kubernetes' Indexed Jobs, Slurm, Volcano.
_NODE_RANKS = ("TORCHX_REPLICA_ID", "JOB_COMPLETION_INDEX", "SLURM_NODEID", "VC_TASK_INDEX")


@dataclass(frozen=True)
class AgentOptions:
    """Everything that the agent is configured with."""

    min_nodes: int
    max_nodes: int
    processes: int
    """Ranks on this node."""
    host: str
    """The host of the rendezvous; localhost with one node."""
    port: int
    """Its port; 0 with one node: any free port."""
    rdzv_id: str
    rdzv_conf: dict[str, str]
    rdzv_timeout: float
    """Seconds for the name to resolve, the port to open, and all nodes to join."""
    node_rank: int | None
    """Number of this node; node 0 hosts the rendezvous. None: torch compares host names."""
    local_addr: str | None
    """The address at which other nodes reach this one."""
    max_restarts: int
    restart_deadline: float
    """Seconds after its first restart by a JobSet when node 0 refuses to start; 0: no limit."""
    shutdown_timeout: float
    """Seconds from a request to stop until ranks that still run are killed."""
    stop_deadline: float
    """Seconds that the ranks get to save after a request to stop."""
    monitor_interval: float
    """Seconds between two checks of the ranks."""
    log_dir: Path | None
    termination_log: Path | None
    preflight: str
    """off, quick or full."""
    preflight_only: bool
    command: tuple[str, ...]
    secret: bytes = field(repr=False)
    """With which the messages of the run are signed; empty: they are not."""

    @property
    def endpoint(self) -> str:
        """``host:port``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def elastic(self) -> bool:
        """Whether nodes may join and leave."""
        return self.min_nodes < self.max_nodes


def parse(
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    prog: str = "python -m launch.agent",
) -> AgentOptions:
    """Reads the command line. Raises UsageError."""
    environ = os.environ if environ is None else environ
    own, command = _split(argv)
    arguments = read(own, "--" in argv, prog)
    values = Values(arguments, environ)
    min_nodes, max_nodes = _nodes(*values.find("nnodes"))
    if values.text("rdzv-backend") != "c10d":
        text, origin = values.find("rdzv-backend")
        raise UsageError(f"--rdzv-backend must be c10d, but is {text!r} ({origin}).")
    host, port = _endpoint(values, environ, max_nodes)
    timeout = values.seconds("shutdown-timeout")
    if not timeout:
        text, origin = values.find("shutdown-timeout")
        raise UsageError(
            f"--shutdown-timeout must be a number of seconds above 0, but is {text!r} ({origin})."
        )
    preflight_only = values.flag("preflight-only")
    preflight = _preflight(*values.find("preflight"))
    if preflight_only and preflight == "off":
        origin = values.find("preflight")[1]
        raise UsageError(
            f"--preflight-only is given, but --preflight is off ({origin}), so there is nothing to "
            "do; remove one of them."
        )
    if preflight == "auto":
        preflight = "full" if preflight_only else ("quick" if max_nodes > 1 else "off")
    if not command and not preflight_only:
        raise UsageError(
            "There is nothing to run: end the options with -- and the command, such as "
            f"`{prog} --nproc-per-node 2 -- {training(prog)} fit --config FILE`."
        )
    log_dir, termination_log = values.text("log-dir"), values.text("termination-log")
    return AgentOptions(
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        processes=_processes(*values.find("nproc-per-node")),
        host=host,
        port=port,
        rdzv_id=values.text("rdzv-id") or environ.get(RUN_ID) or "isorun",
        rdzv_conf=_pairs(*values.find("rdzv-conf")),
        rdzv_timeout=values.seconds("rdzv-timeout", at_least=1),
        node_rank=_node_rank(values, environ, max_nodes),
        # A single node connects only to itself, and its own name may not resolve, such as in a
        # container without network.
        local_addr=values.text("local-addr") or ("127.0.0.1" if max_nodes == 1 else None),
        max_restarts=values.whole("max-restarts", at_least=0),
        restart_deadline=values.seconds("restart-deadline"),
        shutdown_timeout=timeout,
        stop_deadline=_stop_deadline(timeout, environ),
        monitor_interval=values.seconds("monitor-interval"),
        log_dir=Path(log_dir) if log_dir else None,
        termination_log=(
            Path(termination_log)
            if termination_log
            else (TERMINATION_LOG if TERMINATION_LOG.exists() else None)
        ),
        preflight=preflight,
        preflight_only=preflight_only,
        command=command,
        secret=_secret(environ, max_nodes),
    )


def _split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The words before ``--`` and the command after it, with this very Python as ``python``."""
    words = list(argv)
    if "--" not in words:
        return words, ()
    at = words.index("--")
    own, command = words[:at], words[at + 1 :]
    if command and command[0] in ("python", "python3"):
        command[0] = sys.executable
    return own, tuple(command)


def _nodes(text: str, origin: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})(?::([0-9]{1,9}))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise UsageError(
            f"--nnodes must be a number of nodes, such as 2, or a range, such as 1:4, but is "
            f"{text!r} ({origin})."
        )
    return least, most


def _processes(text: str, origin: str) -> int:
    if number := whole_number(text):
        return number
    if text not in ("auto", "gpu", "cpu"):
        raise UsageError(
            f"--nproc-per-node must be a number of at least 1, or auto, gpu or cpu, but is "
            f"{text!r} ({origin})."
        )
    if text == "cpu":
        return threads_per_process(1)  # as many ranks as one process would have threads
    import_torch()
    import torch

    gpus = torch.cuda.device_count()
    if text == "gpu" and not gpus:
        raise UsageError(f"--nproc-per-node is gpu ({origin}), but torch sees no GPU here.")
    return gpus or 1


def _endpoint(values: Values, environ: Mapping[str, str], max_nodes: int) -> tuple[str, int]:
    """Host and port. Several nodes have no default: on localhost each would train alone."""
    port_text, port_origin = values.find("rdzv-port")
    endpoint, origin = values.find("rdzv-endpoint")
    host = endpoint
    if match := re.fullmatch(r"(\[[^\]]+\]|[^:]*)(?::(\w*))?", endpoint):
        host = match[1].strip("[]")  # an IPv6 address has brackets if a port follows
        if match[2] is not None:
            port_text, port_origin = match[2], origin
    port = _port(port_text, port_origin)
    if max_nodes == 1:
        # No other node connects, but other runs on this machine may have the same port.
        return "localhost", 0
    if not host and (variable := values.text("rdzv-host-env")):
        origin = f"environment variable {variable}"
        host = first_host(environ.get(variable, "").strip())
        if not host:
            raise UsageError(
                f"The run has {max_nodes} nodes, but the environment variable {variable} "
                "(--rdzv-host-env), which should hold node 0's host, is not set; set it, or give "
                "the host by --rdzv-endpoint."
            )
    for prefix in ("PET_", ""):  # Kubeflow's operators set the first, torchrun reads both
        if not host and (host := environ.get(f"{prefix}MASTER_ADDR", "").strip()):
            origin = f"environment variable {prefix}MASTER_ADDR"
            if not port_text:
                port_text = environ.get(f"{prefix}MASTER_PORT", "").strip()
                port = _port(port_text, f"environment variable {prefix}MASTER_PORT")
    if not host:
        raise UsageError(
            f"The run has {max_nodes} nodes, but no rendezvous endpoint; give node 0's address by "
            "--rdzv-endpoint HOST[:PORT] or in PET_RDZV_ENDPOINT or MASTER_ADDR."
        )
    if not _is_host(host):
        raise UsageError(
            f"The host of the rendezvous must be a host name or an IP address, but is {host!r} "
            f"({origin}); write HOST or HOST:PORT, without a scheme or a path, and an IPv6 address "
            "with a port as [ADDRESS]:PORT."
        )
    return host, port


def _is_host(text: str) -> bool:
    """Whether a text has the form of a host name or of an IP address."""
    if "$(" in text:  # Kubernetes replaces it in the pod
        return True
    with suppress(ValueError):
        return bool(ip_address(text))
    numeric = re.fullmatch(r"[0-9.]+", text)
    return not numeric and bool(re.fullmatch(r"\w([\w.-]{0,251}\w)?\.?", text))


def _port(text: str, origin: str) -> int:
    if not text:
        return DEFAULT_PORT
    port = port_number(text)
    if port is None:
        raise UsageError(
            f"The port of the rendezvous must be a number from 1 to 65535, but is {text!r} "
            f"({origin})."
        )
    return port


_OWN_OPTIONS = ("backend", "endpoint", "run_id", "min_nodes", "max_nodes", "local_addr")


_NOT_COUNTS = ("is_host", "store_type")
_CONF = (
    "timeout", "join_timeout", "last_call_timeout", "close_timeout", "heartbeat_timeout",
    "keep_alive_interval", "keep_alive_max_attempt", "read_timeout", *_NOT_COUNTS,
)  # fmt: skip
"""What torch's rendezvous reads, and the agent does not set by an option."""


def _pairs(text: str, origin: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        pair = key_value(item)
        if pair is None:
            raise UsageError(
                f"--rdzv-conf must be KEY=VALUE pairs separated by commas, but has {item!r} "
                f"({origin})."
            )
        if pair[0] in _OWN_OPTIONS:
            raise UsageError(
                f"--rdzv-conf has {item!r} ({origin}), which has an option of its own; see --help."
            )
        if pair[0] not in _CONF:
            raise UsageError(
                f"--rdzv-conf has {item!r} ({origin}), but {pair[0]} is not a setting of torch's "
                f"rendezvous{did_you_mean(pair[0], _CONF)} The settings are "
                f"{', '.join(_CONF)}."
            )
        # Without a pause between keep-alives, torch does nothing else.
        if pair[0] not in _NOT_COUNTS and pair[1].lstrip("-").isdecimal() and int(pair[1]) < 1:
            raise UsageError(
                f"--rdzv-conf has {item!r} ({origin}), but {pair[0]} must be at least 1."
            )
        pairs[pair[0]] = pair[1]
    return pairs


def _node_rank(values: Values, environ: Mapping[str, str], max_nodes: int) -> int | None:
    """The number of this node; None if it is not given."""
    text, origin = values.find("node-rank")
    if not text:
        if max_nodes == 1:  # it hosts its own rendezvous, whatever number a launcher gave it
            return 0
        for variable in _NODE_RANKS:
            if text := environ.get(variable, "").strip():
                origin = f"environment variable {variable}"
                break
        else:
            return None
    number = whole_number(text)
    if number is None:
        raise UsageError(f"--node-rank must be a whole number, but is {text!r} ({origin}).")
    if number >= max_nodes:
        nnodes, where = values.find("nnodes")
        raise UsageError(
            f"--node-rank is {number} ({origin}), but --nnodes is {nnodes} ({where}), so nodes "
            f"have the numbers 0 to {max_nodes - 1}; correct one of them."
        )
    return number


def _stop_deadline(timeout: float, environ: Mapping[str, str]) -> float:
    deadline = seconds_in(environ, STOP_DEADLINE)
    if deadline is None:
        return deadlines.stop_deadline(timeout)
    if deadline >= timeout:
        raise UsageError(
            f"{STOP_DEADLINE} is {deadline:g} s (environment), but ranks are killed after "
            f"--shutdown-timeout, {timeout:g} s, perhaps before a checkpoint is complete; make the "
            "timeout longer than the deadline."
        )
    return deadline


def _secret(environ: Mapping[str, str], max_nodes: int) -> bytes:
    """That of the environment. A single node needs no other one to know it, and makes its own."""
    return read_secret(environ) or (secrets.token_hex(32).encode() if max_nodes == 1 else b"")


def _preflight(text: str, origin: str) -> str:
    if text not in PREFLIGHTS:
        raise UsageError(
            f"--preflight must be off, quick, full or auto, but is {text!r} ({origin})."
        )
    return text
