"""The agent's command line as it stands: its options, and the environment variables for them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from launch.contract import UsageError

DEFAULT_PORT = 29500
TERMINATION_LOG = Path("/dev/termination-log")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(
            f"{message[:1].upper()}{message[1:]}; see `python -m launch.agent --help`."
        )


# Option, default, metavar, help. Each is also read from PET_<NAME>, as torchrun does.
OPTIONS = [
    ("nnodes", "1", "N|MIN:MAX", "nodes; with a range, nodes may come and go"),
    ("nproc-per-node", "auto", "N|auto|gpu|cpu", "ranks per node; auto: one per GPU, else 1"),
    ("rdzv-endpoint", "", "HOST[:PORT]", "where the nodes meet: node 0's address"),
    ("rdzv-host-env", "", "NAME", "the environment variable that holds node 0's host"),
    ("rdzv-port", "", "PORT", f"where the endpoint names none (default {DEFAULT_PORT})"),
    ("rdzv-backend", "c10d", "c10d", "the only one; accepted for torchrun's sake"),
    ("rdzv-id", "", "ID", "what tells runs apart; default: $ISORUN_RUN_ID, else isorun"),
    ("rdzv-conf", "", "KEY=VALUE,...", "further settings of torch's rendezvous"),
    ("rdzv-timeout", "900", "SECONDS", "for all nodes to be there, names and ports included"),
    ("node-rank", "", "N", "which node this is; default: from the launcher's environment"),
    ("local-addr", "", "ADDRESS", "under which others reach this node"),
    ("max-restarts", "0", "N", "how often ranks are started again after a failure of the machine"),
    ("shutdown-timeout", "35", "SECONDS", "from a request to stop until ranks are killed"),
    ("monitor-interval", "0.1", "SECONDS", "between two looks at the ranks"),
    ("log-dir", "", "DIR", "keeps the ranks' standard error; default: a temporary directory"),
    ("termination-log", "", "FILE", f"the failure in at most 4096 bytes ({TERMINATION_LOG})"),
    ("preflight", "auto", "off|quick|full|auto", "auto: quick with several nodes, else off"),
]


def parser() -> argparse.ArgumentParser:
    """The command line, for help and for parsing."""
    made = _Parser(
        prog="python -m launch.agent",
        description="Runs once on each node: meets the agents of the other nodes, starts the "
        "ranks of its own, and says how they ended.",
        usage="python -m launch.agent [options] -- python -m train fit ...",
        epilog="Each option may also be given as PET_<NAME> in the environment.",
    )
    for name, default, metavar, text in OPTIONS:
        # torchrun takes both spellings.
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
        shown = f"{text} [{default}]" if default else text
        made.add_argument(*spellings, metavar=metavar, help=shown)
    made.add_argument(
        "--preflight-only", action="store_true", help="look at the nodes, start no training"
    )
    return made


class Given:
    """Values by name, each with where it came from."""

    def __init__(self, arguments: argparse.Namespace, environ: Mapping[str, str]) -> None:
        self._arguments, self._environ = vars(arguments), environ

    def find(self, name: str) -> tuple[str, str]:
        """The value, and its origin in words."""
        key = name.replace("-", "_")
        if self._arguments[key] is not None:
            return str(self._arguments[key]).strip(), f"--{name}"
        variable = f"PET_{key.upper()}"
        if text := self._environ.get(variable, "").strip():
            return text, f"environment variable {variable}"
        return next(default for n, default, *_ in OPTIONS if n == name), "default"

    def text(self, name: str) -> str:
        """The value alone."""
        return self.find(name)[0]

    def whole(self, name: str, *, at_least: int) -> int:
        """The value as a whole number. Raises UsageError."""
        return int(self._number(name, at_least, whole=True))

    def seconds(self, name: str, *, at_least: int = 0) -> float:
        """The value as seconds, which have an end. Raises UsageError."""
        return self._number(name, at_least, whole=False)

    def _number(self, name: str, at_least: int, *, whole: bool) -> float:
        text, origin = self.find(name)
        kind = "a whole number" if whole else "a number of seconds,"
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = None
        if value is None or not at_least <= value < math.inf:
            raise UsageError(
                f"--{name} must be {kind} of at least {at_least}, but is {text!r} ({origin})."
            )
        return value
