"""The stacks of the ranks on this machine, for another process that asks while they go on.

A thread of each rank waits for a byte in a pipe; then it writes the stacks of all threads to a file
in memory. A process of the same user finds both in ``/proc``, without the right to trace, which
pods of the level `restricted` lack. They are gone with the rank, however it ends. No signal is
sent: it would interrupt a system call of the training.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.json_files import Fields, has_fields, parse_object
from train.process.watchdog import Heartbeat
from train.visible import visible

SECONDS = 10.0
"""How long a rank may take to answer."""
_LINK = re.compile(r"/memfd:isorun-stacks-(\d+)-(\d+)-(\d+)(?: \(deleted\))?")
_END = b"\nend of the stacks\n"
_LIMIT = 4 << 20  # of an answer, in bytes
_POLL = 0.02
_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+).*:")
_START = re.compile(r'File ".*/threading\.py", line \d+ in (?:run|_bootstrap\w*)')
_NAME = "stacks"
STACKS: Fields = {
    "rank": int, "pid": int, "host": str, "run": str, "phase": str, "step": int,
    "seconds": (int, float), "threads": list, "error": str,
}  # fmt: skip
"""An answer: phase and step since ``seconds``, each thread with ``name`` and ``frames``, the most
recent one first; or ``error``, why there are none."""


class StackRequests:
    """A context manager in which this rank answers. ``directory`` is the run directory. Where there
    are no files in memory, as on macOS, nobody can ask."""

    def __init__(self, rank: int, directory: Path) -> None:
        self.heartbeat: Heartbeat | None = None
        """What the rank does, once that is known."""
        self._rank, self._directory = rank, directory
        self._files: list[int] = []
        self._ended = False
        self._thread = threading.Thread(target=self._answer_requests, name=_NAME, daemon=True)

    def __enter__(self) -> StackRequests:
        with suppress(AttributeError, OSError):
            self._files = list(os.pipe())
            name = f"isorun-stacks-{os.getpid()}-{self._files[1]}-{self._rank}"
            self._files.append(os.memfd_create(name))
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._ended = True
            os.write(self._files[1], b".")  # a worker that was forked may have the pipe open, too
            self._thread.join()
        for file in self._files:
            os.close(file)
        self._files = []

    def _answer_requests(self) -> None:
        requests, _, answers = self._files
        while os.read(requests, 1024) and not self._ended:
            with suppress(OSError):
                self._answer(answers)

    def _answer(self, file: int) -> None:
        heartbeat = self.heartbeat
        values = {
            "rank": self._rank, "pid": os.getpid(), "host": socket.gethostname(),
            "run": str(self._directory.absolute()),
            "phase": heartbeat.phase if heartbeat else "rendezvous",
            "step": heartbeat.step if heartbeat else 0,
            "seconds": time.monotonic() - heartbeat.at if heartbeat else 0.0,
            "threads": {f"{each.ident or 0:016x}": each.name for each in threading.enumerate()},
        }  # fmt: skip
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, json.dumps(values).encode() + b"\n")
        faulthandler.dump_traceback(file, all_threads=True)  # all at one moment: it keeps the GIL
        os.write(file, _END)


@dataclass
class _Asked:
    """A rank of this machine."""

    pid: int
    rank: int
    requests: Path
    file: Path
    answer: int = -1
    asked: bool = False

    def ask(self, stack: ExitStack, until: float) -> bool:
        """Asks the rank, unless another process does so until a time. False if the rank is gone."""
        try:
            self.answer = os.open(self.file, os.O_RDWR | os.O_NONBLOCK)
            stack.callback(os.close, self.answer)
            if not _locked(self.answer, until):
                return True
            os.ftruncate(self.answer, 0)
            wake = os.open(self.requests, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        with os.fdopen(wake, "wb", buffering=0) as pipe, suppress(BlockingIOError):
            pipe.write(b".")  # a full pipe has requests enough
        self.asked = True
        return True

    def answered(self) -> bytes | None:
        """The answer; None until it is complete."""
        if not self.asked:
            return None
        size = min(os.fstat(self.answer).st_size, _LIMIT)
        data = os.pread(self.answer, size, 0)
        return data.removesuffix(_END) if data.endswith(_END) else None

    def silence(self, seconds: float) -> str:
        """Why there is no answer."""
        if not self.asked:
            return f"another process has been asking it for its stacks for {seconds:g} s"
        return (
            f"no answer within {seconds:g} s: native code keeps Python's global lock, or the "
            f"process does not run; its state is {self.condition()}"
        )

    def condition(self) -> str:
        """What the kernel says of the process: its state, such as ``T (stopped)``."""
        with suppress(OSError):
            found = re.search(r"^State:\s*(.*)", _status(self.pid), re.M)
            return found[1] if found else "unknown"
        return "gone"


def _locked(file: int, until: float) -> bool:
    """Whether no other process asks through this file now, until a time."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(_POLL)


def stacks_here(run: Path | None = None, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """The stacks of this user's ranks on this machine, in the order of the ranks, each with the
    fields ``STACKS``. ``run``: only those of this run directory, and those that do not answer
    within ``seconds``, of which it is not known."""
    until = time.monotonic() + seconds
    with ExitStack() as stack:
        asked = [each for each in list(_ranks_here()) if each.ask(stack, until)]
        answers: dict[int, bytes] = {}
        while len(answers) < len(asked) and time.monotonic() < until:
            for each in asked:
                if each.pid not in answers and (data := each.answered()) is not None:
                    answers[each.pid] = data
            time.sleep(_POLL)
        here = [each for each in asked if each.pid in answers or each.condition() != "gone"]
        found = [_read(each, answers.get(each.pid), seconds) for each in here]
    if run is not None:
        place = run.resolve()
        found = [each for each in found if not each["run"] or Path(each["run"]).resolve() == place]
    return sorted(found, key=lambda each: (each["run"], each["rank"], each["pid"]))


def _ranks_here() -> Iterator[_Asked]:
    """The ranks of this user. A worker that a rank has forked has the files of its parent."""
    with suppress(OSError):
        for process in sorted(Path("/proc").iterdir()):
            if not process.name.isdigit():
                continue
            with suppress(OSError):
                if process.stat().st_uid != os.geteuid():
                    continue
                for file in (process / "fd").iterdir():
                    found = _LINK.fullmatch(str(file.readlink()))
                    if found and found[1] == process.name:
                        requests = process / "fd" / found[2]
                        yield _Asked(int(found[1]), int(found[3]), requests, file)
                        break


def _status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def _read(asked: _Asked, data: bytes | None, seconds: float) -> dict[str, Any]:
    empty = {
        "rank": asked.rank, "pid": asked.pid, "host": socket.gethostname(), "run": "", "phase": "",
        "step": 0, "seconds": 0.0, "threads": [],
    }  # fmt: skip
    if data is None:
        return empty | {"error": asked.silence(seconds)}
    first, _, text = data.partition(b"\n")
    try:
        values = {**parse_object(first), "error": ""}
        names, values["threads"] = values.get("threads"), []
        if not has_fields(values, STACKS) or not isinstance(names, dict):
            raise ValueError("it lacks fields")
    except ValueError as error:
        return empty | {"error": f"the answer cannot be read: {error}"}
    threads = list(_threads(text.decode(errors="replace").splitlines(), names))
    values["threads"] = sorted(threads, key=lambda each: each["name"] != "MainThread")
    return values


def _threads(lines: Sequence[str], names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The threads in the text of faulthandler, but for the one that answers."""
    frames: list[str] = []
    for line in lines:
        if found := _THREAD.fullmatch(line):
            frames, name = [], str(names.get(found[1], f"thread {found[1]}"))
            if name != _NAME:
                yield {"name": name, "frames": frames}
        elif line.strip() and not _START.fullmatch(line.strip()):
            frames.append(line.strip())


def describe_stacks(stacks: dict[str, Any]) -> str:
    """An answer as text, with its control characters as escapes."""
    lines = [f"rank {stacks['rank']} on {stacks['host']} (pid {stacks['pid']}): "]
    if stacks["error"]:
        lines[0] += f"{stacks['error']}."
    else:
        lines[0] += f"{stacks['phase']} of step {stacks['step'] + 1}, for {stacks['seconds']:.1f} s"
    for thread in stacks["threads"]:
        lines += [f"  {thread['name']}", *(f"    {frame}" for frame in thread["frames"])]
    return visible("\n".join(lines))
