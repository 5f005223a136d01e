"""One MLflow run for all attempts of a run: found again, and each step sent once."""

from __future__ import annotations

import getpass
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

# Limits that MLflow 2 and 3 have in common.
_METRICS, _PARAMS = 1000, 100  # per request
_KEY, _PARAM, _TAG = 250, 500, 5000  # characters

_RUN_TAG = "isorun.run_id"
_INVALID = re.compile(r"[^/\w.\- ]")


class MlflowRun:
    """The MLflow run of a run. Creating the object finds or creates it.

    ``record`` is a file with its id. Where that is lost, the run is found by a tag with the run's
    own id, ``run_id``. Every method raises exceptions of MLflow, or OSError.
    """

    def __init__(
        self, client: Any, record: Path, experiment_id: str, run_id: str, name: str
    ) -> None:
        self._client = client
        run = self._known(record) or self._tagged(experiment_id, run_id)
        if run is None:
            run = client.create_run(experiment_id, tags={_RUN_TAG: run_id}, run_name=name)
        self.id: str = run.info.run_id
        write_json(record, {"run_id": self.id})
        if run.info.status != "RUNNING":
            client.update_run(self.id, status="RUNNING")
        self._params = set(run.data.params)
        # The latest step of each metric. MLflow's entities show it only in this form.
        self._last = {metric.key: metric.step for metric in run.to_proto().data.metrics}

    def _known(self, record: Path) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(str(json.loads(record.read_text())["run_id"]))
        except (OSError, ValueError, LookupError, TypeError):
            return None
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None  # of another server
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _tagged(self, experiment_id: str, run_id: str) -> Any:
        found = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{_RUN_TAG}` = '{run_id}'", max_results=1
        )
        return found[0] if found else None

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Sets tags and the parameters that the run does not have yet: MLflow refuses to change
        them."""
        from mlflow.entities import Param, RunTag

        named = {_name(key): _text(value)[:_PARAM] for key, value in params.items()}
        missing = [Param(k, v) for k, v in named.items() if k not in self._params]
        for some in _batches(missing, _PARAMS):
            self._client.log_batch(self.id, params=some, synchronous=True)
        shown = [RunTag(key[:_KEY], _text(value)[:_TAG]) for key, value in tags.items()]
        for some_tags in _batches(shown, _PARAMS):
            self._client.log_batch(self.id, tags=some_tags, synchronous=True)

    def send(self, rows: Iterable[tuple[int, float, Mapping[str, float]]]) -> Iterator[None]:
        """Sends what MLflow lacks of rows (step, seconds since the epoch, metrics), which are in
        the order of steps. Yields before each request."""
        from mlflow.entities import Metric

        lacking = (
            Metric(name, value, int(1000 * seconds), step)
            for step, seconds, metrics in rows
            for name, value in ((_name(name), value) for name, value in metrics.items())
            if step > self._last.get(name, -1)
        )
        for some in _batches(lacking, _METRICS):
            yield
            # A metric that occurs twice in a step is sent once.
            distinct = {(metric.key, metric.step): metric for metric in some}
            self._client.log_batch(self.id, metrics=list(distinct.values()), synchronous=True)
            self._last |= {metric.key: metric.step for metric in some}

    def add_file(self, path: str, content: Any) -> None:
        """Writes a text, or an image of shape (H, W, 3), as an artifact; replaces an earlier
        one."""
        if isinstance(content, str):
            self._client.log_text(self.id, content, path)
        else:
            self._client.log_image(self.id, content, path)

    def file_sizes(self, folder: str) -> dict[str, int]:
        """The artifacts in a folder, with their size in bytes."""
        found = self._client.list_artifacts(self.id, folder)
        return {file.path: file.file_size for file in found if not file.is_dir}

    def end(self, status: str) -> None:
        """Ends this attempt, with a status of MLflow's."""
        self._client.set_terminated(self.id, status)


def experiment_id(client: Any, name: str) -> str:
    """The id of an experiment, which is created where it does not exist."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another run may have created it meanwhile
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ValueError(f"the experiment {name!r} is deleted; restore it or set another")
    return str(found.experiment_id)


def user_name() -> str:
    """The user's name, for MLflow's column of users."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return "unknown"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replaces a file atomically."""
    new = path.with_name(f".{path.name}.{time.monotonic_ns()}")
    new.write_text(json.dumps(values) + "\n")
    new.replace(path)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(items)
    while some := list(islice(remaining, size)):
        yield some


def _name(name: str) -> str:
    """The name as MLflow accepts it: some signs and parts are replaced, since a name may become
    the path of a file, and it is at most 250 characters long."""
    parts = _INVALID.sub("_", name).split("/")
    name = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    if len(name) > _KEY:
        name = f"{name[: _KEY - 9]}-{sha256(name.encode()).hexdigest()[:8]}"
    return name


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
