"""Starts the ranks of one run as processes of this machine, and waits for all of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from train.exits import Exit, RetryError, RunError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_POLL = 0.05
_GRACE = 10.0
"""Seconds that the other ranks have to end by themselves once one has failed."""

# Not `python -m train`, which would run a train.py of the working directory. What the calling
# process can import, the ranks can.
_RANK = """
import json, os, runpy, sys
sys.path += [path for path in json.loads(os.environ["ISORUN_PATH"]) if path not in sys.path]
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


class _Rank(NamedTuple):
    number: int
    process: subprocess.Popen[Any]
    error_file: Path


def run_ranks(arguments: Sequence[str], processes: int) -> Exit:
    """Runs a command of ``python -m train`` on so many ranks of this machine, over gloo or NCCL.

    Returns Exit.DONE, or Exit.PREEMPTED where the run was stopped on request. Raises the error of
    the rank that failed first, as the class of its exit code. SIGINT, SIGTERM and SIGUSR1 that
    this process gets go to the ranks; KeyboardInterrupt after a second SIGINT.
    """
    with tempfile.TemporaryDirectory(prefix="isorun-") as folder:
        ranks: list[_Rank] = []
        try:
            with _forwarding(ranks):
                for number in range(processes):
                    error_file = Path(folder, f"{number}.json")
                    if number == 0:
                        port = _free_port()
                    process = _start(arguments, number, processes, port, error_file)
                    ranks.append(_Rank(number, process, error_file))
                failed = _wait(ranks)
        finally:
            for rank in ranks:
                if rank.process.poll() is None:
                    rank.process.kill()
                rank.process.wait()
        if failed:
            raise _error_of(_first(failed))
    stopped = any(rank.process.returncode == Exit.PREEMPTED for rank in ranks)
    return Exit.PREEMPTED if stopped else Exit.DONE


def _start(
    arguments: Sequence[str], number: int, processes: int, port: int, error_file: Path
) -> subprocess.Popen[Any]:
    path = [str(Path(entry or ".").resolve()) for entry in sys.path]
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {
        "RANK": str(number), "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ISORUN_LAUNCHER": "train.launch", "ISORUN_PATH": json.dumps(path),
        "TORCHELASTIC_ERROR_FILE": str(error_file),
    }  # fmt: skip
    pipes = [None if _is_own(stream) else subprocess.PIPE for stream in (sys.stdout, sys.stderr)]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _RANK, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=pipes[0],
        stderr=pipes[1],
        text=True,
        errors="replace",
        # A group of its own: each signal reaches a rank once, by way of this process.
        start_new_session=True,
    )
    for source, stream in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        if source is not None:
            threading.Thread(target=_relay, args=(source, stream), daemon=True).start()
    return process


def _is_own(stream: Any) -> bool:
    """Whether a child that inherits the file behind the stream writes to the same place. A
    notebook replaces the stream."""
    return stream in (sys.__stdout__, sys.__stderr__)


def _relay(source: IO[str], stream: Any) -> None:
    for line in source:
        stream.write(line)
        stream.flush()


@contextmanager
def _forwarding(ranks: list[_Rank]) -> Iterator[None]:
    """Signals go to the ranks meanwhile. In another thread than the main one there are none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts = 0

    def forward(number: int, _frame: object) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)
        if interrupts > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[_Rank]) -> list[_Rank]:
    """Waits for all ranks. Returns those that failed by themselves, in the order seen."""
    failed: list[_Rank] = []
    deadline: float | None = None
    while running := [rank for rank in ranks if rank.process.poll() is None]:
        failed += [rank for rank in ranks if _has_failed(rank) and rank not in failed]
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE
        if deadline is not None and time.monotonic() > deadline:
            for rank in running:
                rank.process.kill()
            return failed
        time.sleep(_POLL)
    return failed + [rank for rank in ranks if _has_failed(rank) and rank not in failed]


def _has_failed(rank: _Rank) -> bool:
    return rank.process.poll() not in (None, Exit.DONE, Exit.PREEMPTED)


def _first(failed: Sequence[_Rank]) -> _Rank:
    """The rank whose error is the cause: ranks that only lost another one leave no error file."""
    reported = [rank for rank in failed if rank.error_file.exists()]
    return min(reported, key=lambda rank: rank.error_file.stat().st_mtime_ns, default=failed[0])


def _error_of(rank: _Rank) -> BaseException:
    code = rank.process.returncode
    if code == Exit.STOPPED_AT_ONCE:
        return KeyboardInterrupt()
    if code < 0:
        name = signal.Signals(-code).name
        return RetryError(f"Rank {rank.number} was ended by {name}; fix the cause, then rerun.")
    try:
        message = json.loads(rank.error_file.read_text(encoding="utf-8"))["message"]
        kind, _, text = message["message"].partition(": ")
    except (OSError, ValueError, KeyError):
        kind, text = "", f"see the output of rank {rank.number}"
    classes = {cls.__name__: cls for cls in RunError.__subclasses__()}
    if kind in classes:
        return classes[kind](text)
    failed = RunError(f"Rank {rank.number} ended with exit code {code} ({kind}: {text}).")
    failed.code = Exit(code) if code in set(Exit) else Exit.INTERNAL
    return failed


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
