"""The command line of the doctor, and how its process ends."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch.contract import (
    Exit,
    RetryError,
    RunError,
    UsageError,
    first_line,
    this_world,
    training_config,
    write_error_file,
)
from launch.doctor.findings import Finding, Status, broken, exit_code, merged, misset
from launch.doctor.guard import bounded
from launch.doctor.place import Place
from launch.doctor.table import show, summary

if TYPE_CHECKING:
    from launch.contract import LoadedConfig
    from launch.doctor.examination import Examination
    from launch.doctor.meeting import Meeting

_CONFIG_SECONDS = 60.0  # a task's module may import much
_ACK_SECONDS = 3.0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}; see `{self.prog} --help`.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The doctor's own arguments, and in ``command`` the training's: all after ``--``, or
    from the first word on that is no option."""
    parser = _Parser(
        prog="python -m launch.doctor",
        description="Looks for what would keep a training from running here. Started on all "
        "ranks (by torchrun or the node agent) it also compares the nodes and tries the network "
        "between them.",
        epilog="After -- comes the command of the training that is to follow: python -m train ...",
    )
    parser.add_argument(
        "--level", choices=("quick", "full"), default="quick",
        help="quick: about a second; full: measures disk, network and devices, and loads a sample",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings there")
    parser.add_argument(
        "--wait", type=float, default=120.0, metavar="SECONDS",
        help="for the other ranks to come; default: 120",
    )  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.wait <= 0:
        raise UsageError(f"--wait is {arguments.wait:g} (command line); give a number above 0.")
    if arguments.command[:1] == ["--"]:  # torchrun, for one, takes it away
        del arguments.command[0]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Examines, prints and returns the exit code: 0, 64 or 75."""
    try:
        return _main(parse(sys.argv[1:] if argv is None else argv))
    except RunError as error:
        write_error_file(error)
        print(f"isorun: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("isorun: stopped.", file=sys.stderr)
        return Exit.STOPPED_AT_ONCE
    except (OSError, RuntimeError) as error:  # the store, for one, is gone
        text = f"The preflight failed ({type(error).__name__}: {first_line(error)})"
        print(f"isorun: error: {text}; start it again.", file=sys.stderr)
        return Exit.RETRY


def _main(arguments: argparse.Namespace) -> Exit:
    started = time.monotonic()
    # No C++ stacks for what findings say in words; torch reads it once, when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    world = this_world()
    before, loaded = _read_config(arguments.command) if world.local_rank == 0 else ([], None)
    place = Place(world, arguments.level, loaded)
    from launch.doctor.examination import Examination, absent
    from launch.doctor.meeting import alone

    try:
        meeting = _meet(place, arguments.wait)
    except RetryError as error:
        if world.rank != 0:
            raise
        before.append(broken("ranks", str(error), ""))
        meeting = alone(place)
    else:
        if world.rank == 0:
            before += absent(world.world_size, meeting, arguments.wait)

    examination = Examination(place, meeting, before)

    def examine() -> list[Finding]:
        examination.run()
        return []

    examination.note(bounded("preflight", examine, examination.limits.all))
    if world.rank != 0:
        return _verdict(examination, meeting)
    findings = merged(examination.findings, meeting.nodes)
    code = exit_code(findings)
    seconds = time.monotonic() - started
    show(_title(place, meeting, seconds), findings)
    if arguments.json is not None:
        code = _write(arguments.json, place, meeting, findings, seconds) or code
    failures = [f"{f.check} on {f.node}: {f.text}" for f in findings if f.code]
    told = "; ".join(failures) or "The report could not be written."
    _leave(code, told)
    with suppress(RuntimeError):  # whoever keeps the store is gone, and the others with it
        # After all is printed: an agent may end this process now.
        meeting.tell("verdict", [code, told])
        meeting.hear("left", [rank for rank in meeting.members if rank], _ACK_SECONDS)
    return code


def _read_config(command: Sequence[str]) -> tuple[list[Finding], LoadedConfig | None]:
    """The training's config; where it is wrong, on this node perhaps alone, a finding."""
    read: list[LoadedConfig | None] = [None]

    def load() -> list[Finding]:
        try:
            read[0] = training_config(command)
        except RunError as error:
            return [misset("config", line, "") for line in str(error).splitlines()]
        return []

    return bounded("config", load, _CONFIG_SECONDS), read[0]


def _meet(place: Place, seconds: float) -> Meeting:
    from launch.doctor.meeting import meet, open_store

    started = time.monotonic()
    store = open_store(place, seconds)
    return meet(place, store, max(1.0, seconds - (time.monotonic() - started)))


def _verdict(examination: Examination, meeting: Meeting) -> Exit:
    """What rank 0 made of it all; if it says nothing, what this rank found itself."""
    with suppress(RuntimeError):  # rank 0, which keeps the store, is gone
        verdict = meeting.hear("verdict", [0], examination.limits.all).get(0)
        if verdict is not None:
            _leave(Exit(verdict[0]), verdict[1])
        meeting.tell("left", True)
        if verdict is not None:
            return Exit(verdict[0])
    own = [f for f in examination.findings if f.status is Status.FAILED]
    found = "; ".join(f"{f.check}: {f.text}" for f in own) or "found nothing wrong itself"
    raise RetryError(
        f"Rank 0 told rank {meeting.rank} on {meeting.label(meeting.rank)} no result of the "
        f"preflight (this rank: {found}); see what became of rank 0, then start it again."
    )


def _leave(code: Exit, told: str) -> None:
    """What was wrong, for the agent of each node: whichever ends first can say it."""
    if code:
        write_error_file((UsageError if code is Exit.USAGE else RetryError)(told))


def _title(place: Place, meeting: Meeting, seconds: float) -> str:
    nodes = len(meeting.leaders)
    return (
        f"Preflight ({place.level}): {nodes} node{'s' if nodes != 1 else ''}, "
        f"{place.world.world_size} process{'es' if place.world.world_size != 1 else ''}, "
        f"{seconds:.1f} s"
    )


def _write(
    path: Path, place: Place, meeting: Meeting, findings: Sequence[Finding], seconds: float
) -> Exit | None:
    """The findings as JSON; a usage error's code where the file cannot be written."""
    text: dict[str, Any] = {
        "level": place.level,
        "exit_code": exit_code(findings),
        "result": summary(findings),
        "world_size": place.world.world_size,
        "nodes": meeting.nodes,
        "members": [asdict(member) for member in meeting.members.values()],
        "seconds": round(seconds, 3),
        "findings": [finding.to_json() for finding in findings],
    }
    try:
        path.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(
            f"isorun: error: --json is {str(path)!r}, which cannot be written: {error.strerror}; "
            "name another file.",
            file=sys.stderr,
        )
        return Exit.USAGE
    return None
