"""Trials as processes on this machine, and what the runs of trials report."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from launch.agent import start_rank
from launch.contract import (
    InUseError,
    RunDirectory,
    RunError,
    is_count,
    is_number,
    parsed_lines,
    python_module,
    total_steps,
)
from launch.tune.backend import Backend, TrialJob
from launch.tune.study import Claim

_LOG_END = 1 << 16
"""Bytes of the log in which the last error is looked for."""


class LocalBackend(Backend):
    """Starts the ranks of each trial on this machine."""

    def __init__(self, processes: int, places: Sequence[Mapping[str, str]]) -> None:
        """``processes``: ranks of a trial. ``places``: the environment variables of each place."""
        self.parallel = len(places)
        self._processes, self._places = processes, places

    def job(self, claim: Claim, words: Sequence[str], place: int) -> LocalJob:
        """See Backend."""
        log = claim.directory.with_name(f"{claim.directory.name}.log")
        return LocalJob(words, self._processes, log, self._places[place])

    def check(self, files: Sequence[str], overrides: Sequence[str]) -> None:
        """Nothing more than the config, which is checked."""

    def close(self) -> None:
        """Nothing."""


class LocalJob(TrialJob):
    """Starts ``fit`` for one run directory, with its ranks on this machine."""

    def __init__(
        self, words: Sequence[str], processes: int, log: Path, variables: Mapping[str, str]
    ) -> None:
        self.command = [*python_module("train"), "fit", *words]
        if processes > 1:
            agent = [*python_module("launch.agent"), "--nproc-per-node", str(processes)]
            self.command = [*agent, "--", *self.command]
        self.place = str(log)
        self._log, self._variables = log, variables
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0

    def find(self) -> bool:
        """No: they stop when the process that started them ends."""
        return False

    def start(self, variables: Mapping[str, str]) -> None:
        """Starts them. They are asked to stop, by SIGTERM, if this process dies (on Linux)."""
        environment = {**os.environ, **self._variables, **variables}
        environment.pop("TORCHELASTIC_ERROR_FILE", None)  # it is for errors of this process
        with self._log.open("ab") as output:
            self._started_at = output.tell()
            self._process = subprocess.Popen(
                # In a session of its own: each signal reaches it once, by way of this process.
                [sys.executable, "-S", start_rank.__file__, str(os.getpid()), *self.command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def started(self) -> bool:
        """See TrialJob."""
        return self._process is not None

    def code(self) -> int | None:
        """See TrialJob."""
        code = self._process.poll() if self._process else None
        return 128 - code if code is not None and code < 0 else code

    def stop(self) -> None:
        """See TrialJob."""
        self.interrupt(signal.SIGTERM)

    def interrupt(self, number: signal.Signals) -> bool:
        """Passes the signal on."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
        return True

    def kill(self) -> None:
        """See TrialJob."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def last_error(self) -> str:
        """The last error that this start has printed; empty without one."""
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(self._started_at, file.tell() - _LOG_END))
            lines = file.read().decode(errors="replace").splitlines()
            errors = [line.partition("error: ")[2] for line in lines if "isorun: error: " in line]
            return errors[-1] if errors else ""
        return ""


class Evaluations:
    """Reads the evaluations of a run from its metrics.jsonl while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._end = 0

    def new(self) -> list[tuple[int, dict[str, float]]]:
        """The rows with an evaluation since the last call: step, and value by name without
        ``eval/``. A file that was replaced is read again from its start."""
        try:
            now = self._path.stat()
        except OSError:
            return []
        if self._file is None or not os.path.samestat(os.fstat(self._file.fileno()), now):
            self.close()
            self._file, self._end = self._path.open("rb"), 0
        self._file.seek(self._end)
        found = []
        for line, row in parsed_lines(self._file):  # type: ignore[arg-type]
            if not line.endswith(b"\n"):
                break  # it is still being written
            self._end += len(line)
            if row is None or not is_count(row.get("step")):
                continue
            values = {name[5:]: _number(row[name]) for name in row if name.startswith("eval/")}
            if values:
                found.append((row["step"], values))
        return found

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _number(value: Any) -> float:
    return float(value) if is_number(value) else math.nan


def final_step(directory: RunDirectory) -> int | None:
    """The last step of the run, if its config and its last attempt say so."""
    try:
        return total_steps(directory.stored_config() or {}, directory.attempts.last())
    except (RunError, OSError):
        return None


def is_in_use(directory: RunDirectory) -> bool:
    """Whether a process holds the lock of the run directory, such as one of a trial whose
    controller was killed. Raises RunError for one that cannot be used."""
    try:
        directory.acquire()
    except InUseError:
        return True
    directory.release()
    return False
