"""What the agent is told, read from its command line and environment, and checked."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.agent.arguments import DEFAULT_PORT, TERMINATION_LOG, Given, parser
from launch.contract import UsageError, first_host

_MARGIN = 5.0  # seconds between the end of a stop in the ranks and their being killed
# Where launchers say which node this is: TorchX, Kubernetes' Indexed Jobs, Slurm.
_NODE_RANKS = ("TORCHX_REPLICA_ID", "JOB_COMPLETION_INDEX", "SLURM_NODEID")


@dataclass(frozen=True)
class Options:
    """All that the agent is told."""

    min_nodes: int
    max_nodes: int
    processes: int
    """Ranks on this node."""
    host: str
    """Where the nodes meet; with one node there is nobody to meet, and any free port will do."""
    port: int
    rdzv_id: str
    rdzv_conf: dict[str, str]
    rdzv_timeout: float
    """Seconds for the name to be known, the port to be open, and all nodes to come."""
    node_rank: int | None
    """Which node this is; node 0 keeps the meeting point. None: found out by comparing names."""
    local_addr: str | None
    """The address under which other nodes reach this one."""
    max_restarts: int
    shutdown_timeout: float
    """Seconds from a request to stop until ranks that are still there are killed."""
    stop_deadline: float
    """Seconds that ranks are told they have for that."""
    monitor_interval: float
    """Seconds between two looks at the ranks."""
    log_dir: Path | None
    termination_log: Path | None
    preflight: str
    """off, quick or full."""
    preflight_only: bool
    command: tuple[str, ...]

    @property
    def endpoint(self) -> str:
        """Host and port in one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def elastic(self) -> bool:
        """Whether nodes may come and go."""
        return self.min_nodes < self.max_nodes


def parse(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Options:
    """Reads the command line. Raises UsageError."""
    environ = os.environ if environ is None else environ
    own, command = _split(argv)
    arguments = parser().parse_args(own)
    given = Given(arguments, environ)
    min_nodes, max_nodes = _nodes(*given.find("nnodes"))
    if given.text("rdzv-backend") != "c10d":
        text, origin = given.find("rdzv-backend")
        raise UsageError(f"--rdzv-backend must be c10d, but is {text!r} ({origin}).")
    host, port = _endpoint(given, environ, max_nodes)
    timeout = given.seconds("shutdown-timeout")
    preflight = _preflight(*given.find("preflight"))
    if preflight == "auto":
        preflight = "full" if arguments.preflight_only else ("quick" if max_nodes > 1 else "off")
    if not command and not arguments.preflight_only:
        raise UsageError(
            "There is nothing to run: end the options with -- and the command, such as "
            "`python -m launch.agent --nproc-per-node 2 -- python -m train fit --config FILE`."
        )
    log_dir, termination_log = given.text("log-dir"), given.text("termination-log")
    return Options(
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        processes=_processes(*given.find("nproc-per-node")),
        host=host,
        port=port,
        rdzv_id=given.text("rdzv-id") or environ.get("ISORUN_RUN_ID") or "isorun",
        rdzv_conf=_pairs(*given.find("rdzv-conf")),
        rdzv_timeout=given.seconds("rdzv-timeout", at_least=1),
        # One node alone keeps its own meeting point, whatever number a launcher gave it.
        node_rank=_node_rank(given, environ) if max_nodes > 1 else 0,
        # One node talks to itself alone, and its own name may be unknown even to itself, such as
        # in a container without network.
        local_addr=given.text("local-addr") or ("127.0.0.1" if max_nodes == 1 else None),
        max_restarts=given.whole("max-restarts", at_least=0),
        shutdown_timeout=timeout,
        stop_deadline=_deadline(timeout, environ),
        monitor_interval=given.seconds("monitor-interval"),
        log_dir=Path(log_dir) if log_dir else None,
        termination_log=(
            Path(termination_log)
            if termination_log
            else (TERMINATION_LOG if TERMINATION_LOG.exists() else None)
        ),
        preflight=preflight,
        preflight_only=arguments.preflight_only,
        command=command,
    )


def _split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """What stands before ``--``, and after it; there ``python`` is the Python that runs this."""
    words = list(argv)
    if "--" not in words:
        return words, ()
    at = words.index("--")
    own, command = words[:at], words[at + 1 :]
    if command and command[0] in ("python", "python3"):
        command[0] = sys.executable
    return own, tuple(command)


def _nodes(text: str, origin: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise UsageError(
            f"--nnodes must be a number of nodes, such as 2, or a range, such as 1:4, but is "
            f"{text!r} ({origin})."
        )
    return least, most


def _processes(text: str, origin: str) -> int:
    if text.isdigit() and int(text) >= 1:
        return int(text)
    if text not in ("auto", "gpu", "cpu"):
        raise UsageError(
            f"--nproc-per-node must be a number of at least 1, or auto, gpu or cpu, but is "
            f"{text!r} ({origin})."
        )
    if text == "cpu":
        return len(os.sched_getaffinity(0))
    import torch

    gpus = torch.cuda.device_count()
    if text == "gpu" and not gpus:
        raise UsageError(f"--nproc-per-node is gpu ({origin}), but torch sees no GPU here.")
    return gpus or 1


def _endpoint(given: Given, environ: Mapping[str, str], max_nodes: int) -> tuple[str, int]:
    """Never localhost by default where there are several nodes: each would train alone."""
    port_text, port_origin = given.find("rdzv-port")
    endpoint, origin = given.find("rdzv-endpoint")
    host = endpoint
    if match := re.fullmatch(r"(\[[^\]]+\]|[^:]*)(?::(\w*))?", endpoint):
        host = match[1].strip("[]")  # which an IPv6 address has around it where a port follows
        if match[2] is not None:
            port_text, port_origin = match[2], origin
    if port_text and not (port_text.isdigit() and int(port_text) < 65536):
        raise UsageError(
            f"The port of the rendezvous must be a number below 65536, but is {port_text!r} "
            f"({port_origin})."
        )
    if max_nodes == 1:
        # There is nobody to meet, but perhaps others on this machine that were given the same port.
        return "localhost", 0
    port = int(port_text) if port_text else DEFAULT_PORT
    if not host and (variable := given.text("rdzv-host-env")):
        host = first_host(environ.get(variable, "").strip())
        if not host:
            raise UsageError(
                f"The run wants {max_nodes} nodes, but {variable}, which should hold node 0's host "
                "(--rdzv-host-env), is not set in the environment; set it, or name the host by "
                "--rdzv-endpoint."
            )
    if not host and environ.get("MASTER_ADDR"):
        host, port_text = environ["MASTER_ADDR"], port_text or environ.get("MASTER_PORT", "")
        port = int(port_text) if port_text.isdigit() else port
    if not host:
        raise UsageError(
            f"The run wants {max_nodes} nodes, but nothing says where they meet; give node 0's "
            "address by --rdzv-endpoint HOST[:PORT] or in PET_RDZV_ENDPOINT or MASTER_ADDR."
        )
    return host, port


_OWN_OPTIONS = ("backend", "endpoint", "run_id", "min_nodes", "max_nodes", "local_addr")


def _pairs(text: str, origin: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(
                f"--rdzv-conf must be KEY=VALUE pairs with commas between, but has {item!r} "
                f"({origin})."
            )
        if key.strip() in _OWN_OPTIONS:
            raise UsageError(
                f"--rdzv-conf has {item!r} ({origin}), which is said by an option of its own; see "
                "--help."
            )
        pairs[key.strip()] = value.strip()
    return pairs


def _node_rank(given: Given, environ: Mapping[str, str]) -> int | None:
    text, origin = given.find("node-rank")
    if not text:
        for variable in _NODE_RANKS:
            if text := environ.get(variable, "").strip():
                origin = f"environment variable {variable}"
                break
        else:
            return None
    if not text.isdigit():
        raise UsageError(f"--node-rank must be a whole number, but is {text!r} ({origin}).")
    return int(text)


def _deadline(timeout: float, environ: Mapping[str, str]) -> float:
    text = environ.get("ISORUN_STOP_DEADLINE", "").strip()
    if not text:
        return max(timeout - _MARGIN, timeout / 2)
    try:
        deadline = float(text)
    except ValueError:
        raise UsageError(
            f"ISORUN_STOP_DEADLINE must be a number of seconds, but is {text!r} (environment)."
        ) from None
    if deadline >= timeout:
        raise UsageError(
            f"ISORUN_STOP_DEADLINE is {deadline:g} s (environment), but ranks are killed after "
            f"--shutdown-timeout, {timeout:g} s: a checkpoint could be cut off; make the timeout "
            "longer than the deadline."
        )
    return deadline


def _preflight(text: str, origin: str) -> str:
    if text not in ("off", "quick", "full", "auto"):
        raise UsageError(
            f"--preflight must be off, quick, full or auto, but is {text!r} ({origin})."
        )
    return text
