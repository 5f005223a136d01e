"""The command line ``isorun COMMAND ...``: every command of both packages under one name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from launch.contract import TRAIN_COMMANDS, run_train

COMMANDS = {
    "history": "list this user's launches and how they ended",
    "show": "print everything recorded about one launch",
    "why": "explain why a launch failed and what to do",
    "tune": "search for good values of config keys, with runs as trials",
}
"""Commands that are modules of ``launch.commands``."""

PROGRAMS = {
    "render": "print or apply the Kubernetes objects of a run",
    "doctor": "check machines and network before a training starts",
    "cluster": "look into a run on Kubernetes: pods, files, stacks, TensorBoard",
    "agent": "start the ranks of one node, with exit codes and restarts",
}
"""Commands with a parser of their own, since a command of the user's follows their options."""

_DESCRIPTION = "Distributed training whose result does not depend on where it runs."


def main(argv: Sequence[str] | None = None, prog: str = "isorun") -> int:
    """Runs a command and returns the exit code; a user's mistake never shows a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in TRAIN_COMMANDS and not any(map(_is_on_a_cluster, argv)):
        return run_train(argv, prog)  # first: it registers its exit before imports register theirs
    if argv and argv[0] == "agent":
        from launch.agent.main import main as agent

        return agent(argv[1:], f"{prog} agent")
    if argv and argv[0] == "doctor":
        from launch.doctor.__main__ import run as doctor

        return doctor(argv[1:], f"{prog} doctor")

    from launch.contract import exit_code_of

    return exit_code_of(lambda: _run(argv, prog), prints=True)


def _is_on_a_cluster(word: str) -> bool:
    """Whether a word is the handle of a run on Kubernetes."""
    return word.startswith("kubernetes_job://")


def _run(argv: Sequence[str], prog: str) -> int:
    from launch.contract import Commands, check_command

    if not argv or argv[0].startswith("-"):
        _general(argv, prog)
    check_command(argv[0], [*TRAIN_COMMANDS, *COMMANDS, *PROGRAMS])
    if argv[0] in TRAIN_COMMANDS:
        from launch.pods.copies import local_copies

        with local_copies(argv) as words:
            return run_train(words, prog)
    if argv[0] == "cluster":
        from launch.pods.command_line import main as cluster

        return int(cluster(argv[1:], f"{prog} cluster"))
    if argv[0] == "render":
        from launch.kubernetes.command_line import main as render

        return int(render(argv[1:], f"{prog} render"))
    commands = Commands("launch.commands", COMMANDS, _DESCRIPTION)
    arguments = commands.parse(argv, prog)
    return int(arguments.run(arguments))


def _general(argv: Sequence[str], prog: str) -> NoReturn:
    """``--help`` and ``--version``. Raises UsageError for anything else."""
    import argparse

    from launch.contract import Parser, UsageError, check_command_first, train_version

    check_command_first(argv, [*TRAIN_COMMANDS, *COMMANDS, *PROGRAMS], prog)
    groups = {"training": TRAIN_COMMANDS, "launching": {**COMMANDS, **PROGRAMS}}
    lines = [_DESCRIPTION]
    for title, commands in groups.items():
        lines += ["", f"{title}:", *(f"    {name:<14}{text}" for name, text in commands.items())]
    parser = Parser(
        prog=prog,
        usage=f"{prog} COMMAND ...",
        description="\n".join(lines),
        epilog=f"Each command has its own help: {prog} COMMAND --help\n"
        "TorchX starts runs on clusters: torchx run isorun.fit",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"isorun {train_version()}")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.parse_args(argv)
    raise UsageError(f"The command must be the first argument; see `{prog} --help`.")
