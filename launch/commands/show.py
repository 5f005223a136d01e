"""Print everything recorded about one launch: the job, the code, and what was submitted."""

from __future__ import annotations

import argparse
import json
import shlex

from launch.contract import Exit, say
from launch.history.launches import Launch, find_launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_run_argument(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the lines of the launch log instead"
    )


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``RUN``, which selects a launch."""
    parser.add_argument(
        "run_name",
        metavar="RUN",
        help="run id or its beginning, job name or handle; of several launches the newest is used",
    )


def run(arguments: argparse.Namespace) -> Exit:
    """Prints it."""
    launch = find_launch(arguments.run_name)
    if arguments.json:
        say(json.dumps({"submitted": launch.line, "ended": launch.end}, indent=1))
        return Exit.DONE
    state = launch.refresh()
    for name, value in _facts(launch, state):
        say(f"{name:<13} {value}")
    say(f"\nSubmitted to {launch.line['scheduler']}:\n{launch.line['request']}")
    return Exit.DONE


def _facts(launch: Launch, state: str) -> list[tuple[str, str]]:
    line = launch.line
    git = line["git"]
    code = (
        f"{git['commit']}{', with uncommitted changes' if git['dirty'] else ''}"
        if git
        else "no git commit"
    )
    image = line["image"]
    if line["image_digest"]:
        image += f" ({line['image_digest']})"
    facts = [
        ("run", launch.run_id),
        ("W&B id", str(line["wandb_id"])),
        ("handle", launch.handle),
        ("submitted", f"{launch.when} from {line['host']}:{line['directory']}"),
        ("state", f"{state}{f', exit code {launch.exit_code}' if launch.exit_code else ''}"),
        ("code", code),
        ("image", image),
        ("nodes", str(line["nodes"])),
        ("run directory", str(launch.run_directory() or "unknown")),
        ("command", shlex.join(launch.command)),
    ]
    return [*facts, *(("scheduler", note) for note in launch.notes)]
