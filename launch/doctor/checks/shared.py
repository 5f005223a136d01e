"""Whether all nodes have the same run directory, on a shared file system."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.contract import first_line
from launch.doctor.checks.storage import existing
from launch.doctor.findings import Finding, infrastructure_failure, misconfigured, ok, skipped
from launch.doctor.place import Place
from launch.doctor.rendezvous import Rendezvous

CHECK = "shared directory"
APPEARS_WITHIN = 10.0  # seconds; NFS caches for some time that a file does not exist


def check(place: Place, rendezvous: Rendezvous, patience: float) -> list[Finding]:
    """Called on the first rank of each node. Rank 0 creates a folder beside the run directory;
    each node must find it and write a file into it, and rank 0 must find all of these."""
    directory = None if place.loaded is None else str(place.loaded.run_directory.absolute())
    if rendezvous.rank != 0:
        _answer(rendezvous, directory, patience)
        return []
    try:
        folder = None if directory is None else _create(Path(directory))
    except OSError as error:
        folder = None
        reason = f"rank 0 cannot write to {directory} ({error.strerror})"
    else:
        reason = "the run directory is not known without a config"
    try:
        rendezvous.publish("folder", None if folder is None else str(folder))
        others = rendezvous.leaders[1:]
        answers = rendezvous.collect("shared", others, patience + APPEARS_WITHIN)
        if folder is None:
            return [skipped(CHECK, reason)]
        return [
            *_problems(rendezvous, directory, answers),
            *_unseen(rendezvous, folder, [rank for rank in answers if answers[rank]["wrote"]]),
        ] or [ok(CHECK, f"all nodes see the files of the others in {folder.parent}")]
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _create(directory: Path) -> Path:
    folder = Path(tempfile.mkdtemp(dir=existing(directory), prefix=".isorun-doctor-"))
    folder.chmod(0o755)  # like a checkpoint's folder: other users may read but not write
    return folder


def _answer(rendezvous: Rendezvous, directory: str | None, patience: float) -> None:
    folder = rendezvous.collect("folder", [0], patience).get(0)
    answer: dict[str, Any] = {"directory": directory, "seen": False, "wrote": False, "error": ""}
    if folder is not None and directory is not None:
        answer["seen"] = _appears(Path(folder), time.monotonic() + APPEARS_WITHIN)
        if answer["seen"]:
            try:
                (Path(folder) / f"rank-{rendezvous.rank}").write_text("here", encoding="utf-8")
                answer["wrote"] = True
            except OSError as error:
                answer["error"] = first_line(error)
    rendezvous.publish("shared", answer)


def _appears(path: Path, deadline: float) -> bool:
    while True:
        with suppress(OSError):
            list(path.parent.iterdir())  # makes NFS refresh its cache
        if path.exists():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _problems(
    rendezvous: Rendezvous, directory: str | None, answers: dict[int, dict[str, Any]]
) -> list[Finding]:
    findings = []
    for rank, answer in answers.items():
        node, first = rendezvous.label(rank), rendezvous.label(0)
        if answer["directory"] is None:
            continue  # its config could not be read, which is a finding of its own
        if answer["directory"] != directory:
            findings.append(
                misconfigured(
                    CHECK,
                    f"the run directory is {answer['directory']} here, but {directory} on {first}",
                    "give run.dir as an absolute path, the same on all nodes",
                    node=node,
                )
            )
        elif not answer["seen"]:
            findings.append(
                misconfigured(
                    CHECK,
                    f"a folder that {first} created in {directory} did not appear here within "
                    f"{APPEARS_WITHIN:g} s",
                    "put run.dir on a file system that all nodes have mounted (NFS, Lustre, a "
                    "ReadWriteMany volume): every node writes a part of each checkpoint",
                    node=node,
                )
            )
        elif not answer["wrote"]:
            findings.append(
                misconfigured(
                    CHECK,
                    f"cannot write to a folder that {first} created in {directory}: "
                    f"{answer['error']}",
                    "run all nodes as the same user, and mount the file system writable",
                    node=node,
                )
            )
    return findings


def _unseen(rendezvous: Rendezvous, folder: Path, wrote: list[int]) -> list[Finding]:
    deadline = time.monotonic() + APPEARS_WITHIN
    return [
        infrastructure_failure(
            CHECK,
            f"a file that it wrote to {folder.parent} did not appear on {rendezvous.label(0)} "
            f"within {APPEARS_WITHIN:g} s",
            "check the mount options: caches must not hide files of other nodes",
            node=rendezvous.label(rank),
        )
        for rank in wrote
        if not _appears(folder / f"rank-{rank}", deadline)
    ]
