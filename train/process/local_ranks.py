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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from train.exits import Exit, RetryError, error_of_code
from train.process.cores import threads_per_process
from train.process.stop_signals import received_signals, stop_signals_blocked
from train.signing import new_secret

_POLL = 0.05
_LAST_LINES = 5.0
"""Seconds that the output of the ranks may take to arrive once they have ended."""
# What an agent of torchrun has set for the calling process; these ranks have no such agent.
_OF_TORCHRUN = ("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE")

# Not `python -m train`, which would run a train.py of the working directory. What the calling
# process can import, the ranks can. Until the command handles SIGINT, it ends the rank without a
# traceback. `train` unblocks the stop signals, which are blocked until it handles them. If the
# calling process is killed, the rank is asked to stop.
_RANK = """
import json, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path += [path for path in json.loads(os.environ["ISORUN_PATH"]) if path not in sys.path]
from train.process.parent import end_with_parent
end_with_parent(signal.SIGTERM, lambda: os.getppid() == int(os.environ["ISORUN_PARENT"]))
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


class _Rank(NamedTuple):
    number: int
    process: subprocess.Popen[Any]
    error_file: Path
    relays: list[threading.Thread]


def run_ranks(arguments: Sequence[str], processes: int, *, grace: float | None) -> Exit:
    """Runs a command of ``python -m train`` on so many ranks of this machine, over gloo or NCCL.

    Returns Exit.DONE, or Exit.PREEMPTED where the run was stopped on request. Raises the error of
    the rank that failed first, as the class of its exit code; the others have ``grace`` seconds
    (None: any time) to end by themselves then, such as to finish a checkpoint. Stop signals that
    this process gets go to the ranks; KeyboardInterrupt after a second SIGINT.
    """
    with tempfile.TemporaryDirectory(prefix="isorun-") as folder:
        ranks: list[_Rank] = []
        try:
            with received_signals() as received:
                port = _free_port()
                inherited = {**os.environ, **new_secret(os.environ)}
                for number in range(processes):
                    error_file = Path(folder, f"{number}.json")
                    environment = rank_environment(inherited, number, processes, port, error_file)
                    ranks.append(_start(arguments, number, environment, error_file))
                failed = _wait(ranks, received, grace)
        finally:
            for rank in ranks:
                if rank.process.poll() is None:
                    rank.process.kill()
                rank.process.wait()
            last = time.monotonic() + _LAST_LINES
            for relay in [relay for rank in ranks for relay in rank.relays]:
                relay.join(max(0.0, last - time.monotonic()))
        if failed:
            raise error_of_rank(_first(failed))
    stopped = any(rank.process.returncode != Exit.DONE for rank in ranks)
    return Exit.PREEMPTED if stopped else Exit.DONE


def rank_environment(
    inherited: Mapping[str, str], number: int, processes: int, port: int, error_file: Path
) -> dict[str, str]:
    """The environment of one rank of a process with the environment ``inherited``."""
    path = [str(Path(entry or ".").resolve()) for entry in sys.path]
    kept = {
        name: value
        for name, value in inherited.items()
        if not name.startswith("TORCHELASTIC_") and name not in _OF_TORCHRUN
    }
    return {"OMP_NUM_THREADS": str(threads_per_process(processes))} | kept | {
        "RANK": str(number), "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ISORUN_LAUNCHER": "train.launch", "ISORUN_PATH": json.dumps(path),
        "ISORUN_PARENT": str(os.getpid()),
        "TORCHELASTIC_ERROR_FILE": str(error_file),
    }  # fmt: skip


def _start(
    arguments: Sequence[str], number: int, environment: Mapping[str, str], error_file: Path
) -> _Rank:
    pipes = [None if _is_own(stream) else subprocess.PIPE for stream in (sys.stdout, sys.stderr)]
    with stop_signals_blocked():
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
    relays = [
        threading.Thread(target=_relay, args=(source, stream), daemon=True)
        for source, stream in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        if source is not None
    ]
    for relay in relays:
        relay.start()
    return _Rank(number, process, error_file, relays)


def _is_own(stream: Any) -> bool:
    """Whether a child that inherits the file behind the stream writes to the same place. A
    notebook replaces the stream."""
    return stream in (sys.__stdout__, sys.__stderr__)


def _relay(source: IO[str], stream: Any) -> None:
    for line in source:
        stream.write(line)
        stream.flush()


def _wait(ranks: Sequence[_Rank], received: Sequence[int], grace: float | None) -> list[_Rank]:
    """Waits for all ranks, and passes on the signals. Returns the ranks that failed by themselves,
    in the order seen. Raises KeyboardInterrupt after a second SIGINT."""
    failed: list[_Rank] = []
    passed_on = 0
    deadline: float | None = None
    while running := [rank for rank in ranks if rank.process.poll() is None]:
        while passed_on < len(received):
            for rank in running:
                rank.process.send_signal(received[passed_on])
            passed_on += 1
        if received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        failed += [rank for rank in ranks if _has_failed(rank, received) and rank not in failed]
        if failed and deadline is None and grace is not None:
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            for rank in running:
                rank.process.kill()
            return failed
        time.sleep(_POLL)
    return failed + [rank for rank in ranks if _has_failed(rank, received) and rank not in failed]


def _has_failed(rank: _Rank, received: Sequence[int]) -> bool:
    code = rank.process.poll()
    # Before a rank handles a signal that was passed on, it dies of it: it was stopped.
    return code not in (None, Exit.DONE, Exit.PREEMPTED) and -code not in received


def _first(failed: Sequence[_Rank]) -> _Rank:
    """The rank whose error is the cause: ranks that only lost another one leave no error file."""
    reported = [rank for rank in failed if rank.error_file.exists()]
    return min(reported, key=lambda rank: rank.error_file.stat().st_mtime_ns, default=failed[0])


def error_of_rank(rank: _Rank) -> BaseException:
    """The error of a rank that failed, as the class of its exit code."""
    code = rank.process.returncode
    if code == Exit.STOPPED_AT_ONCE:
        return KeyboardInterrupt()
    if code < 0:
        name = signal.Signals(-code).name
        return RetryError(f"Rank {rank.number} was ended by {name}; fix the cause, then rerun.")
    ended = f"Rank {rank.number} ended with exit code {code}"
    try:
        message = json.loads(rank.error_file.read_text(encoding="utf-8"))["message"]
        kind, _, text = message["message"].partition(": ")
    except (OSError, ValueError, KeyError):
        return error_of_code(code, f"{ended}; see its output.")
    error = error_of_code(code, text)
    is_own = type(error).__name__ == kind
    return error if is_own else error_of_code(code, f"{ended} ({kind}: {text}).")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
