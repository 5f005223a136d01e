"""Whether the run directory is one and the same on all nodes."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.contract import first_line
from launch.doctor.checks.storage import existing
from launch.doctor.findings import Finding, broken, misset, ok, skipped
from launch.doctor.meeting import Meeting
from launch.doctor.place import Place

CHECK = "shared directory"
APPEARS_WITHIN = 10.0  # seconds: NFS keeps in mind for some time that a file was not there


def check(place: Place, meeting: Meeting, patience: float) -> list[Finding]:
    """Called on the first rank of each node. Rank 0 makes a folder where the run directory is;
    each node must see it and put a file into it, and rank 0 must see all of these."""
    directory = None if place.loaded is None else str(place.loaded.run_directory.absolute())
    if meeting.rank != 0:
        _answer(meeting, directory, patience)
        return []
    try:
        folder = None if directory is None else _make(Path(directory))
    except OSError as error:
        folder = None
        reason = f"rank 0 cannot write to {directory} ({error.strerror})"
    else:
        reason = "without a config the run directory is not known"
    try:
        meeting.tell("folder", None if folder is None else str(folder))
        others = meeting.leaders[1:]
        answers = meeting.hear("shared", others, patience + APPEARS_WITHIN)
        if folder is None:
            return [skipped(CHECK, reason)]
        return [
            *_judge(meeting, directory, answers),
            *_unseen(meeting, folder, [rank for rank in answers if answers[rank]["wrote"]]),
        ] or [ok(CHECK, f"all nodes see in {folder.parent} what the others write")]
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _make(directory: Path) -> Path:
    folder = Path(tempfile.mkdtemp(dir=existing(directory), prefix=".isorun-doctor-"))
    folder.chmod(0o755)  # as a checkpoint's folder is: readable for other users, writable for none
    return folder


def _answer(meeting: Meeting, directory: str | None, patience: float) -> None:
    told = meeting.hear("folder", [0], patience).get(0)
    answer: dict[str, Any] = {"directory": directory, "seen": False, "wrote": False, "error": ""}
    if told is not None and directory is not None:
        answer["seen"] = _appears(Path(told), time.monotonic() + APPEARS_WITHIN)
        if answer["seen"]:
            try:
                (Path(told) / f"rank-{meeting.rank}").write_text("here", encoding="utf-8")
                answer["wrote"] = True
            except OSError as error:
                answer["error"] = first_line(error)
    meeting.tell("shared", answer)


def _appears(path: Path, deadline: float) -> bool:
    while True:
        with suppress(OSError):
            list(path.parent.iterdir())  # which makes NFS look again
        if path.exists():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _judge(
    meeting: Meeting, directory: str | None, answers: dict[int, dict[str, Any]]
) -> list[Finding]:
    findings = []
    for rank, answer in answers.items():
        node, first = meeting.label(rank), meeting.label(0)
        if answer["directory"] is None:
            continue  # its config could not be read, which is a finding of its own
        if answer["directory"] != directory:
            findings.append(
                misset(
                    CHECK,
                    f"the run directory is {answer['directory']} here, but {directory} on {first}",
                    "give run.dir as an absolute path, the same on all nodes",
                    node=node,
                )
            )
        elif not answer["seen"]:
            findings.append(
                misset(
                    CHECK,
                    f"what {first} writes to {directory} is not seen here within "
                    f"{APPEARS_WITHIN:g} s",
                    "put run.dir on a file system that all nodes have mounted (NFS, Lustre, a "
                    "ReadWriteMany volume): a checkpoint has a share of every node",
                    node=node,
                )
            )
        elif not answer["wrote"]:
            findings.append(
                misset(
                    CHECK,
                    f"nothing can be written here to a folder that {first} made in {directory}: "
                    f"{answer['error']}",
                    "run all nodes as the same user, with the file system mounted for writing",
                    node=node,
                )
            )
    return findings


def _unseen(meeting: Meeting, folder: Path, wrote: list[int]) -> list[Finding]:
    deadline = time.monotonic() + APPEARS_WITHIN
    return [
        broken(
            CHECK,
            f"what it writes to {folder.parent} is not seen on {meeting.label(0)} within "
            f"{APPEARS_WITHIN:g} s",
            "see how the file system is mounted: caches must show what others write",
            node=meeting.label(rank),
        )
        for rank in wrote
        if not _appears(folder / f"rank-{rank}", deadline)
    ]
