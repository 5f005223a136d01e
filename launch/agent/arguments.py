"""The agent's command line: its options, and the environment variables for them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.contract import Parser, UsageError
from launch.deadlines import SHUTDOWN_TIMEOUT
from launch.ports import DEFAULT_PORT

TERMINATION_LOG = Path("/dev/termination-log")

CODE_NOTES = "ISORUN_CODE_NOTES"
"""The variable with the path of a text file whose lines are warnings about submitted code."""
PREFLIGHTS = ("auto", "off", "quick", "full")
"""The values of ``--preflight``."""

# Option, default, metavar, help. Each is also read from PET_<NAME>, as torchrun does.
OPTIONS = [
    ("nnodes", "1", "N|MIN:MAX", "number of nodes; with a range, nodes may join and leave"),
    ("nproc-per-node", "auto", "N|auto|gpu|cpu", "ranks per node; auto: one per GPU, else 1"),
    ("rdzv-endpoint", "", "HOST[:PORT]", "address of node 0, which hosts the rendezvous"),
    ("rdzv-host-env", "", "NAME", "environment variable that holds node 0's host"),
    ("rdzv-port", "", "PORT", f"port if the endpoint has none (default {DEFAULT_PORT})"),
    ("rdzv-backend", "c10d", "c10d", "only c10d; exists for compatibility with torchrun"),
    ("rdzv-id", "", "ID", "separates runs; default: $ISORUN_RUN_ID, else isorun"),
    ("rdzv-conf", "", "KEY=VALUE,...", "further settings of torch's rendezvous"),
    ("rdzv-timeout", "900", "SECONDS", "time for all nodes to join, names and ports included"),
    (
        "node-rank", "", "N",
        "0 on the node that keeps the rendezvous, another number on each other one; ranks are "
        "numbered by the nodes' addresses; default: from the launcher's environment",
    ),
    ("local-addr", "", "ADDRESS", "address at which other nodes reach this node"),
    ("max-restarts", "0", "N", "restarts of the ranks after infrastructure failures"),
    (
        "restart-deadline", "0", "SECONDS",
        "after the first restart of this agent by a JobSet, when node 0 ends them; 0: none",
    ),
    (
        "shutdown-timeout", f"{SHUTDOWN_TIMEOUT:g}", "SECONDS",
        "from a request to stop until ranks are killed",
    ),
    ("monitor-interval", "0.1", "SECONDS", "between two checks of the ranks"),
    ("log-dir", "", "DIR", "keeps the ranks' standard error; default: a temporary directory"),
    ("termination-log", "", "FILE", f"failure record of at most 4096 bytes ({TERMINATION_LOG})"),
    ("preflight", "auto", "|".join(PREFLIGHTS), "auto: quick with several nodes, else off"),
]  # fmt: skip


_MOST = 10**9
"""The largest number of an option: 31 years in seconds, more than libraries take in places."""


def as_nnodes(fewest: int, most: int) -> str:
    """The numbers as --nnodes gives them."""
    return f"{fewest}" if fewest == most else f"{fewest}:{most}"


def variable(option: str) -> str:
    """The environment variable for an option of the agent: ``--rdzv-port`` is PET_RDZV_PORT."""
    return f"PET_{option.removeprefix('--').replace('-', '_').upper()}"


def training(prog: str) -> str:
    """How examples call the training where the agent is called ``prog``."""
    return "isorun" if prog.startswith("isorun") else "python -m train"


def parser(prog: str = "python -m launch.agent") -> argparse.ArgumentParser:
    """The parser of the agent's options, without the command after ``--``."""
    made = Parser(
        prog=prog,
        description="Runs once on each node: joins the agents of the other nodes, starts the "
        "ranks of this node, and returns how they ended.",
        usage=f"{prog} [options] -- {training(prog)} fit ...",
        epilog="Each option can also be set as PET_<NAME> in the environment.",
    )
    for name, default, metavar, text in OPTIONS:
        # torchrun takes both spellings.
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
        shown = f"{text} [{default}]" if default else text
        made.add_argument(*spellings, metavar=metavar, help=shown)
    made.add_argument(
        "--preflight-only", action="store_true", help="check the nodes, start no training"
    )
    return made


# Options of torchrun that the agent does not have.
_OF_TORCHRUN = {
    "standalone": "leave it out, since one node needs no address",
    "master-addr": "use --rdzv-endpoint",
    "master-port": "use --rdzv-port",
    "redirects": "leave it out; --log-dir keeps the ranks' standard error",
    "tee": "leave it out; --log-dir keeps the ranks' standard error",
    "role": "leave it out",
    "no-python": "leave it out, since the agent starts the command after -- as it is",
    "start-method": "leave it out",
    "use-env": "leave it out, since ranks get LOCAL_RANK in the environment",
}


def read(words: Sequence[str], has_command: bool, prog: str) -> argparse.Namespace:
    """The options in the words before ``--``. Raises UsageError."""
    arguments, rest = parser(prog).parse_known_args(words)
    for word in rest:
        name = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and name in _OF_TORCHRUN:
            raise UsageError(
                f"{word} (command line) is an option of torchrun, not of the agent; "
                f"{_OF_TORCHRUN[name]}."
            )
        if not has_command:
            python = "" if rest[0] in ("python", "python3", "isorun") else "python "
            raise UsageError(
                f"{rest[0]!r} is not an option of the agent (command line); write -- before the "
                f"command: `{prog} [options] -- {python}{' '.join(rest[:4])} ...`."
            )
    if rest:
        raise UsageError(f"Unrecognized arguments: {' '.join(rest)}; see `{prog} --help`.")
    return arguments


class Values:
    """The options' values, each with its origin."""

    def __init__(self, arguments: argparse.Namespace, environ: Mapping[str, str]) -> None:
        self._arguments, self._environ = vars(arguments), environ

    def find(self, name: str) -> tuple[str, str]:
        """The value and its origin, for messages."""
        key = name.replace("-", "_")
        if self._arguments[key] is not None:
            return str(self._arguments[key]).strip(), f"--{name}"
        if text := self._environ.get(variable(name), "").strip():
            return text, f"environment variable {variable(name)}"
        return next(default for n, default, *_ in OPTIONS if n == name), "default"

    def text(self, name: str) -> str:
        """The value without its origin."""
        return self.find(name)[0]

    def flag(self, name: str) -> bool:
        """Whether a flag is given, or its variable is set. Raises UsageError."""
        text = self._environ.get(variable(name), "").strip()
        if text.lower() not in ("", "0", "1", "false", "true"):
            raise UsageError(f"{variable(name)} must be 1, true, 0 or false, but is {text!r}.")
        return bool(self._arguments[name.replace("-", "_")]) or text.lower() in ("1", "true")

    def whole(self, name: str, *, at_least: int) -> int:
        """The value as an integer. Raises UsageError."""
        return int(self._number(name, at_least, whole=True))

    def seconds(self, name: str, *, at_least: int = 0) -> float:
        """The value as a finite number of seconds. Raises UsageError."""
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
        if value > _MOST:
            raise UsageError(
                f"--{name} must be {kind} of at most {_MOST}, but is {text!r} ({origin})."
            )
        return value
