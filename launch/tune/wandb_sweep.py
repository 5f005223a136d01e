"""W&B's server as the sampler of a study: a sweep, and this process as its agents.

Each place for a trial is an agent of its own, since W&B gives an agent one run at a time. A thread
tells the server every few seconds which runs go on, and receives new runs and requests to stop.
The texts of the GraphQL operations are those of W&B's own agent.
"""

from __future__ import annotations

import io
import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from launch.contract import (
    RetryError,
    RunError,
    UsageError,
    check_wandb_login,
    first_line,
    log,
)

HEARTBEAT = 5.0
"""Seconds between two messages of an agent."""
_TIMEOUT = 20
"""Seconds for an answer of the server."""
_REGISTER = """
mutation CreateAgent($host: String!, $projectName: String, $entityName: String, $sweep: String!) {
    createAgent(input: {
        host: $host, projectName: $projectName, entityName: $entityName, sweep: $sweep
    }) { agent { id } }
}
"""
_BEAT = """
mutation Heartbeat($id: ID!, $metrics: JSONString, $runState: JSONString) {
    agentHeartbeat(input: { id: $id, metrics: $metrics, runState: $runState }) {
        agent { id }
        commands
    }
}
"""


def create_sweep(config: Mapping[str, Any], project: str, entity: str | None) -> str:
    """Registers a sweep with W&B; returns it as ENTITY/PROJECT/ID. Raises UsageError or
    RetryError."""
    check_wandb_login()
    import wandb

    try:
        with redirect_stdout(io.StringIO()):
            sweep_id = wandb.sweep(dict(config), entity=entity, project=project)
    except Exception as error:
        raise _unreachable(error) from error
    # wandb sets both to what the server has answered.
    entity = os.environ.get("WANDB_ENTITY") or entity or ""
    return f"{entity}/{os.environ.get('WANDB_PROJECT') or project}/{sweep_id}"


def sweep_url(sweep: str) -> str:
    """The page of a sweep."""
    import wandb

    entity, project, sweep_id = sweep.split("/")
    base = wandb.setup().settings.app_url
    return f"{base}/{entity}/{project}/sweeps/{sweep_id}"


def run_variables(sweep: str, run_id: str) -> dict[str, str]:
    """The environment variables that make a run one of the sweep."""
    entity, project, sweep_id = sweep.split("/")
    found = {"WANDB_SWEEP_ID": sweep_id, "WANDB_RUN_ID": run_id, "WANDB_PROJECT": project}
    return {**found, "WANDB_ENTITY": entity} if entity else found


@dataclass(frozen=True)
class GivenRun:
    """A run that the server wants."""

    id: str
    """The id of the W&B run."""
    arguments: dict[str, Any]
    """By parameter a dict with its ``value``."""


class SweepAgents:
    """The agents of this process, one for each place."""

    def __init__(self, sweep: str, places: int) -> None:
        """``sweep``: ENTITY/PROJECT/ID. Raises UsageError or RetryError if the server refuses or
        does not answer."""
        check_wandb_login()
        import wandb

        self.sweep = sweep
        self.exhausted = False
        """Whether the server has no more runs for these agents."""
        self.error: RunError | None = None
        """Why the agents cannot go on."""
        self._running: dict[int, str] = {}
        self._wanted: set[int] = set()
        self._given: dict[int, GivenRun] = {}
        self._stops: set[str] = set()
        self._agents: dict[int, str] = {}
        self._places, self._is_reported = places, False
        self._lock, self._wake, self._ended = threading.Lock(), threading.Event(), False
        entity, project, self._id = sweep.split("/")
        self._names = {"entityName": entity or None, "projectName": project}
        service: Any = getattr(wandb.Api(), "_service_api", None)
        if not hasattr(service, "execute_graphql"):
            raise UsageError(
                f"wandb {wandb.__version__} cannot be used for --wandb, because its interface has "
                "changed; install wandb 0.31."
            )
        self._send = service.execute_graphql
        try:
            self._register(0)
        except Exception as error:
            raise _unreachable(error) from error
        # Else the trials would use the service of this process, which may end before them.
        os.environ.pop("WANDB_SERVICE", None)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def next(self, place: int) -> GivenRun | None:
        """The next run for a free place; None while the server has given none."""
        with self._lock:
            given = self._given.pop(place, None)
            if given is None and place not in self._wanted and not self.exhausted:
                self._wanted.add(place)
                self._wake.set()
            return given

    @property
    def is_awaited(self) -> bool:
        """Whether a run may still come for a place that wants one."""
        with self._lock:
            return bool(self._given or (self._wanted and not self.exhausted))

    def set_running(self, runs: Mapping[int, str]) -> None:
        """Says which run is at which place; other places are free."""
        with self._lock:
            self._running = dict(runs)

    def wants_to_stop(self, run_id: str) -> bool:
        """Whether the server wants a run to stop, by its early termination or a user's request."""
        with self._lock:
            return run_id in self._stops

    def close(self) -> None:
        """Ends the heartbeats."""
        self._ended = True
        self._wake.set()
        self._thread.join(1.0)

    def _work(self) -> None:
        while not self._ended:
            self._wake.clear()
            for place in range(self._places):
                self._beat(place)
            self._wake.wait(HEARTBEAT)

    def _register(self, place: int) -> None:
        variables = {"host": socket.gethostname(), "sweep": self._id, **self._names}
        answer = self._send(_REGISTER, variables=variables, timeout=_TIMEOUT)
        self._agents[place] = answer["createAgent"]["agent"]["id"]

    def _beat(self, place: int) -> None:
        with self._lock:
            run = self._running.get(place)
            if self._ended or (run is None and (place not in self._wanted or self.exhausted)):
                return
        try:
            if place not in self._agents:
                self._register(place)
            variables = {
                "id": self._agents[place], "metrics": "{}",
                "runState": json.dumps({run: True} if run else {}),
            }  # fmt: skip
            answer = self._send(_BEAT, variables=variables, timeout=_TIMEOUT)
            commands = json.loads(answer["agentHeartbeat"]["commands"] or "[]")
        except Exception as error:
            self._failed(error)
            return
        self._is_reported = False
        self._obey(place, run, commands)

    def _obey(self, place: int, run: str | None, commands: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            for each in commands:
                kind = each.get("type")
                if kind in ("run", "resume") and run is None:
                    self._given[place] = GivenRun(str(each["run_id"]), dict(each["args"]))
                    self._wanted.discard(place)
                elif kind == "stop":
                    self._stops.add(str(each["run_id"]))
                elif kind == "exit":
                    self.exhausted = True
                    if run is not None:  # the sweep was cancelled
                        self._stops.add(run)

    def _failed(self, error: Exception) -> None:
        """Training does not depend on the server: only new trials wait for it."""
        if _status(error) == 404:
            self.error = UsageError(
                f"W&B has no sweep {self.sweep} any more; choose another run.dir for a new study."
            )
        elif not self._is_reported and not self._ended:
            self._is_reported = True
            log(f"warning: W&B does not answer ({first_line(error)}); new trials wait for it.")


def _unreachable(error: Exception) -> RunError:
    from wandb.errors import AuthenticationError

    # A key of the wrong form; the class is also that of a server that does not answer.
    is_no_key = isinstance(error, AuthenticationError) and "API key" in str(error)
    if is_no_key or _status(error) in (400, 401, 403, 404):
        return UsageError(
            f"W&B refuses the sweep ({first_line(error)}); correct track.wandb_project, "
            "track.wandb_entity or WANDB_API_KEY."
        )
    return RetryError(
        f"W&B cannot be reached ({first_line(error)}); run the command again to continue."
    )


def _status(error: Exception) -> int | None:
    """The HTTP status in an error of wandb; None without one."""
    status = getattr(getattr(error, "response", None), "http_status", None)
    return status if isinstance(status, int) else None
