"""The trials of a study as TorchX jobs, one each.

The handle of a trial's job is kept in the study, with the run id under which it is submitted. A
controller that was killed at any moment, also during a submission, finds the job by one of them.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.contract import (
    RUN_ID,
    WANDB_ID,
    Exit,
    RetryError,
    RunDirectory,
    RunError,
    first_line,
    is_number,
    is_worth_retrying,
    log,
    new_run_id,
)
from launch.failure_record import last_record
from launch.history.launch_log import FINAL
from launch.torchx.submission import LOCAL, JobOptions, Submitter, recorded_code, submitted_handle
from launch.tune.backend import Backend, TrialJob
from launch.tune.study import Claim
from launch.tune.trial import is_in_use

_POLL, _POLL_LOCAL = 5.0, 0.2
"""Seconds between two questions for the state of a job."""
_APPEARS = 60.0
"""Seconds after its submission in which a scheduler may not know a job yet."""


class JobsBackend(Backend):
    """Submits each trial to a scheduler of TorchX."""

    def __init__(self, job_options: JobOptions, parallel: int, name: str, directory: Path) -> None:
        """``name``: the base of the names of runs. ``directory``: that of the study. Raises
        UsageError."""
        self.parallel = parallel
        # Only local_cwd has this option: without it, the logs of its jobs are temporary.
        self.submitter = Submitter(job_options, {"log_dir": str((directory / "jobs").absolute())})
        self.name = name

    def check(self, files: Sequence[str], overrides: Sequence[str]) -> None:
        """Prepares a job and does not submit it. Raises RunError for what would be refused."""
        self.submitter.prepare(files, overrides, {})

    def job(self, claim: Claim, words: Sequence[str], place: int) -> Job:
        """See Backend."""
        return Job(claim, words, self.submitter, f"{self.name}-{claim.number}")

    def close(self) -> None:
        """See Backend."""
        self.submitter.close()


class Job(TrialJob):
    """The job of one trial. Its attribute ``job`` in the study has ``run_id``, ``time`` (of the
    submission, seconds since the epoch), ``retries`` (those before it) and ``handle``."""

    def __init__(self, claim: Claim, words: Sequence[str], submitter: Submitter, name: str) -> None:
        self.place = ""
        self._claim, self._submitter, self._name = claim, submitter, name
        self._files = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
        self._overrides = [*words[2 * len(self._files) :]]
        self._run = RunDirectory(claim.directory)
        self._handle = ""
        self._since = 0.0
        self._next_look = 0.0
        self._code: int | None = None
        self._refused = ""
        """Why the scheduler did not take the job."""
        self._silent = False

    def find(self) -> bool:
        """See TrialJob. A job that was stopped or killed has no result: it is submitted again."""
        noted: Mapping[str, Any] = self._claim.trial.user_attrs.get("job") or {}
        if not noted or noted["retries"] != self._claim.retries:
            return False
        handle = noted.get("handle") or submitted_handle(noted["run_id"])
        if not handle:
            return False
        self._use(handle, noted["time"])
        code = self.code()
        if code is None or not (is_worth_retrying(code) or code == Exit.STOPPED_AT_ONCE):
            return True
        self._handle, self._code = "", None
        return False

    def start(self, variables: Mapping[str, str]) -> None:
        """Submits the job. One that the scheduler cannot take now has ended with 75."""
        noted: Mapping[str, Any] = self._claim.trial.user_attrs.get("job") or {}
        run_id = variables.get(RUN_ID) or noted.get("run_id") or new_run_id(self._name)
        now = time.time()
        intended = {"run_id": run_id, "time": now, "retries": self._claim.retries}
        given = {**variables, RUN_ID: run_id, WANDB_ID: run_id}
        try:
            prepared = self._submitter.prepare(self._files, self._overrides, given)
            self._claim.note(job=intended)  # before it: found again if this process dies in it
            handle = self._submitter.submit(prepared)
        except RetryError as error:
            self._code, self._refused = int(Exit.RETRY), str(error)
            return
        self._claim.note(job={**intended, "handle": handle})
        self._use(handle, now)
        log(f"trial {self._claim.number} is {handle}")

    def _use(self, handle: str, since: float) -> None:
        self._handle = self.place = handle
        self._since, self._next_look = since, 0.0

    @property
    def started(self) -> bool:
        """See TrialJob."""
        return bool(self._handle) or self._code is not None

    def code(self) -> int | None:
        """See TrialJob. Where the scheduler cannot tell, the run directory does."""
        now = time.monotonic()
        if self._code is not None or now < self._next_look:
            return self._code
        self._next_look = now + (_POLL_LOCAL if self._ends_with_this_command else _POLL)
        try:
            state = self._submitter.state(self._handle)
        except RetryError as error:
            if not self._silent:
                log(f"warning: {first_line(error)}; trial {self._claim.number} is asked for again.")
            self._silent = True
            return None
        self._silent = False
        appears = 0.0 if self._ends_with_this_command else _APPEARS
        if state is None and (time.time() - self._since < appears or self._is_in_use()):
            return None
        if state is None or state in FINAL:
            self._code = self._end(state)
        return self._code

    def _end(self, state: str | None) -> int:
        """The exit code of a job that has ended."""
        if state == "SUCCEEDED" or (state is None and self._run.finished() is not None):
            return int(Exit.DONE)
        ended = self._last_attempt().get("ended") or {}
        codes = (
            recorded_code(self._handle), self._record().get("exit_code"), ended.get("code"),
            Exit.PREEMPTED if state == "CANCELLED" else Exit.RETRY,
        )  # fmt: skip
        return next(int(code) for code in codes if isinstance(code, int) and code)

    def _record(self) -> Mapping[str, Any]:
        """The newest failure record of an agent since the submission."""
        record = last_record(self._run.path) or {"time": 0}
        return record if record["time"] >= self._since else {}

    def _last_attempt(self) -> Mapping[str, Any]:
        """The last attempt of the run, if it began after the submission."""
        attempt = self._run.attempts.last()
        began = attempt.get("time")
        return attempt if is_number(began) and began >= self._since else {}

    def _is_in_use(self) -> bool:
        return self._run.path.exists() and is_in_use(self._run)

    @property
    def _ends_with_this_command(self) -> bool:
        return self._handle.startswith(f"{LOCAL}://")

    def stop(self) -> None:
        """Cancels the job: the scheduler sends SIGTERM, and does not start it again. A scheduler
        that cannot be reached leaves that to the file ``stop`` of the run."""
        if self._code is not None or not self._handle:
            return
        try:
            self._submitter.cancel(self._handle)
        except RunError as error:
            log(f"warning: {first_line(error)}; the run of trial {self._claim.number} is asked to "
                "stop by a file in its directory.")  # fmt: skip
            if self._run.exists:
                self._run.stop_file.touch()
        self._next_look = 0.0

    def interrupt(self, number: signal.Signals) -> bool:
        """Stops a job that would end with this command. Others run on."""
        if self._ends_with_this_command:
            self.stop()
        return self._ends_with_this_command or self._code is not None

    def kill(self) -> None:
        """Nothing: the scheduler does so, some time after a request to stop."""

    def last_error(self) -> str:
        """See TrialJob."""
        ended = self._last_attempt().get("ended") or {}
        error = self._refused or self._record().get("first", {}).get("error") or ended.get("reason")
        lines = str(error or "").strip().splitlines()
        return lines[0] if lines else ""
