"""``isorun cluster``: the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from launch.contract import Exit, Parser, UsageError, path_argument, port_number, say
from launch.kubernetes import state
from launch.kubernetes.containers import Container
from launch.pods.copies import copy
from launch.pods.find import ClusterRun, find_run
from launch.pods.reader import container_of
from launch.pods.stacks import print_stacks
from launch.pods.tensorboard import PORT, serve
from launch.pods.view import overview

PROG = "isorun cluster"
_DESCRIPTION = """\
Look into a run on Kubernetes: its pods, its files, its stacks, TensorBoard.

RUN is a handle as `torchx run` prints it (kubernetes_job://SESSION/NAMESPACE:NAME), NAMESPACE:NAME,
the name of a Job, JobSet or TrainJob, or the run id of a launch. kubectl must be in PATH.
"""
_RUN_DIRECTORY = "the run directory as the pods see it; default: that of the command of the run"
_ACTIONS = {
    "status": "print its state, queue, pods, last step and last sign of life",
    "cp": "copy its run directory, or a file of it, to this machine",
    "tensorboard": "serve TensorBoard for it on this machine",
    "stacks": "print what each of its ranks does now, and its Python stacks",
    "shell": "run a shell, or the command after --, in one of its pods",
    "port-forward": "forward ports of this machine to one of its pods",
}


def main(argv: Sequence[str], prog: str = PROG) -> Exit:
    """Runs an action. Raises UsageError or RetryError."""
    at = argv.index("--") if "--" in argv else len(argv)
    given = parser(prog).parse_args(argv[:at])
    command = list(argv[at + 1 :])
    if command and given.action != "shell":
        raise UsageError(f"`{prog} {given.action}` takes no command; remove -- and what follows.")
    run = find_run(given.run, given.namespace)
    if given.action == "status":
        for line in overview(run, given.run_dir):
            say(line)
    elif given.action == "cp":
        without = given.without_checkpoints
        made = copy(run, given.path, given.to, checkpoints=not without, directory=given.run_dir)
        say(f"Copied to {made}")
    elif given.action == "tensorboard":
        serve(run, given.port, given.run_dir)
    elif given.action == "stacks":
        return print_stacks(run, run.running_pods() or [_running_pod(run, None)], given.rank)
    elif given.action == "shell":
        terminal = ["-it"] if not command or os.isatty(0) else ["-i"]
        _become(_container(run, given.node).exec_command(command or ["bash"], *terminal))
    else:
        _become(_container(run, given.node).forward_command(given.port))
    return Exit.DONE


def parser(prog: str = PROG) -> Parser:
    """The parser of all actions."""
    made = Parser(
        prog=prog,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = made.add_subparsers(
        dest="action", metavar="ACTION", required=True, parser_class=Parser
    )
    each = {name: actions.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
            for name, text in _ACTIONS.items()}  # fmt: skip
    for name, action in each.items():
        action.add_argument("run", metavar="RUN", help="handle, NAMESPACE:NAME, name or run id")
        action.add_argument("-n", "--namespace", help="default: that of the kubeconfig's context")
        if name in ("status", "cp", "tensorboard"):
            action.add_argument("--run-dir", metavar="DIR", help=_RUN_DIRECTORY)
        if name in ("shell", "port-forward"):
            action.add_argument(
                "--node", type=int, metavar="K", help="node; default: the first that runs"
            )
    each["stacks"].add_argument("--rank", type=int, metavar="N", help="only this rank")
    each["cp"].add_argument(
        "path", nargs="?", default=".", metavar="PATH",
        help="file or directory in the run directory; default: all of it",
    )  # fmt: skip
    each["cp"].add_argument("to", type=path_argument, metavar="DEST", help="where to copy it")
    each["cp"].add_argument(
        "--without-checkpoints", action="store_true", help="leave out checkpoints/"
    )
    each["tensorboard"].add_argument("--port", type=_port, default=PORT, help=f"default: {PORT}")
    each["port-forward"].add_argument(
        "port", nargs="+", type=_ports, metavar="[LOCAL:]PORT", help="port of the pod"
    )
    each["shell"].usage = "%(prog)s [-h] [-n NAMESPACE] [--node K] RUN [-- COMMAND ...]"
    return made


def _port(word: str) -> int:
    if found := port_number(word):
        return found
    raise argparse.ArgumentTypeError(f"{word!r} is not a port; give a number from 1 to 65535")


def _ports(word: str) -> str:
    for each in word.split(":", 1):
        _port(each)
    return word


def _container(run: ClusterRun, node: int | None) -> Container:
    return container_of(run, _running_pod(run, node))


def _running_pod(run: ClusterRun, node: int | None) -> dict[str, Any]:
    """One of a node, or the first one. Raises UsageError."""
    if found := run.running_pod(node):
        return found
    which = "no running pod" if node is None else f"no running pod of node {node}"
    pods = [f"{p['metadata']['name']} ({p['status'].get('phase')})" for p in run.pods()]
    raise UsageError(
        f"{run.label} has {which}; its pods are {', '.join(pods) or 'gone'}, its state is "
        f"{state.app_state(run.workload).name}."
    )


def _become(words: Sequence[str]) -> NoReturn:
    """Replaces this process, so that signals and the terminal are those of kubectl."""
    os.execv(words[0], list(words))
