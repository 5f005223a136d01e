"""Reports the progress of a run to Kubeflow Trainer, which shows it in the status of the TrainJob.

The interface is new in Kubeflow Trainer 2.2 (feature gate TrainJobStatus, alpha): the trainer sets
three variables in its pods, and accepts requests of these pods about their own TrainJob.
https://github.com/kubeflow/trainer has it in pkg/statusserver and pkg/apis/trainer/v1alpha1.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from train.exits import Exit, first_line
from train.track.sinks import RunInfo, Sink

URL = "KUBEFLOW_TRAINER_SERVER_URL"
TOKEN_FILE = "KUBEFLOW_TRAINER_SERVER_TOKEN"
CA_FILE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"

_EVERY = 10.0
"""Seconds between requests. The trainer passes on 5 per second, of all TrainJobs together."""
_LONGEST_PAUSE = 300.0
"""Seconds until the next request after several that failed."""
_SECONDS = 3.0
"""Time-out of each step of a request: a server that is gone shall hardly delay the end of a run."""
_METRICS, _LETTERS, _LARGEST = 256, 64, 2**31 - 1
"""The most metrics, the longest name of one, and the largest number that the trainer accepts."""
_ANSWER = 4096
_TOKEN = 1 << 16

_log = logging.getLogger("train")


def trainjob_sink(run: RunInfo) -> Sink | None:
    """The sink, in a pod of a TrainJob whose trainer has the interface; None anywhere else."""
    given = {name: os.environ.get(name, "").strip() for name in (URL, TOKEN_FILE, CA_FILE)}
    return TrainJobSink(run, given) if given[URL] else None


class TrainJobSink(Sink):
    """Sends percentage, remaining time and newest metrics. One warning if that fails; it is tried
    again, with growing pauses."""

    name = "the status of the TrainJob"

    def __init__(self, run: RunInfo, given: Mapping[str, str]) -> None:
        """``given``: the values of the three variables."""
        super().__init__(run)
        self._given = given
        self._metrics: dict[str, float] = {}
        self._step = run.start_step
        self._began: tuple[float, int] | None = None
        """When the first step of this attempt was logged, and which it was."""
        self._due = 0.0
        self._pause = _EVERY
        self._is_new = False
        self._failing = False
        self._warned = False
        self._done = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the state, unless it has just done so."""
        now = self._now()
        self._began = self._began or (now, step)
        self._metrics |= metrics
        self._step, self._is_new = step, True
        if time.monotonic() >= self._due:
            self._send(now)

    def end(self, code: int) -> None:
        """Sends the last state: all of it, or how far the run got."""
        self._done = code == Exit.DONE
        if self._done or (self._is_new and not self._failing):
            self._send(self._now())

    def _now(self) -> float:
        return self.logged_at or time.time()

    def _send(self, now: float) -> None:
        try:
            self._post(json.dumps({"trainerStatus": self._status(now)}).encode())
            self._is_new = self._failing = False
            self._pause = _EVERY
        except Exception as error:  # of ssl, http.client, the socket, the files
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._failing = True
            if not self._warned:
                self._warned = True
                _log.warning(
                    "The status of the TrainJob cannot be updated (%s); the training goes on, and "
                    "it is tried again.",
                    first_line(error),
                )
        self._due = time.monotonic() + self._pause

    def _status(self, now: float) -> dict[str, Any]:
        """What Kubeflow Trainer's type TrainerStatus has."""
        total = self.run.total_steps
        share = min(1.0, self._step / total) if total else 0.0
        status: dict[str, Any] = {
            # The whole is reported by a run that has finished, its last evaluation included.
            "progressPercentage": 100 if self._done else min(99, math.floor(100 * share)),
            "metrics": [
                {"name": name, "value": f"{value:.6g}"}
                for name, value in self._metrics.items()
                if 0 < len(name) <= _LETTERS
            ][:_METRICS],
            "lastUpdatedTime": datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        began, first = self._began or (now, self._step)
        if self._done:
            status["estimatedRemainingSeconds"] = 0
        elif self._step > first and now > began:
            left = (total - self._step) * (now - began) / (self._step - first)
            status["estimatedRemainingSeconds"] = min(max(0, round(left)), _LARGEST)
        return status

    def _post(self, body: bytes) -> None:
        """One request. Raises OSError, HTTPException or ValueError.

        Not by urllib: it would follow a redirection, with the token, and go through a proxy.
        """
        import ssl
        from http.client import HTTPSConnection
        from urllib.parse import urlsplit

        url = urlsplit(self._given[URL])
        if url.scheme != "https" or not url.hostname:
            raise ValueError(f"{URL} must be an https:// address, but is {self._given[URL]!r}")
        # Both files are replaced while the run trains.
        context = ssl.create_default_context(cafile=self._given[CA_FILE] or None)
        # By default Python 3.13 refuses certificates without all optional extensions, as clusters
        # make them.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token()}"}
        connection = HTTPSConnection(url.hostname, url.port, timeout=_SECONDS, context=context)
        try:
            connection.request("POST", url.path, body, headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(f"HTTP {answer.status}{_reason(answer.read(_ANSWER))}")
        finally:
            connection.close()

    def _token(self) -> str:
        if not self._given[TOKEN_FILE]:
            raise ValueError(f"{TOKEN_FILE} is not set")
        with Path(self._given[TOKEN_FILE]).open(encoding="ascii") as file:
            token = file.read(_TOKEN).strip()
        if (
            not token or not token.isprintable() or " " in token
        ):  # the error of http.client shows it
            raise ValueError(f"the file {self._given[TOKEN_FILE]} ({TOKEN_FILE}) holds no token")
        return token


def _reason(answer: bytes) -> str:
    """The message of a Status of Kubernetes; empty for other answers."""
    try:
        message = json.loads(answer)["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f", {message}" if isinstance(message, str) else ""
