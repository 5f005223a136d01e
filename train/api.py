"""The Python API: what the command line does, from a script or a notebook.

Each function takes what the command line takes: config files and ``key=value`` overrides, in any
order. Errors are exceptions with the text of the command line, of the class RunError, whose
``code`` is the exit code. One run at a time in a process.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.artifacts.runs import received_runs
from train.checkpoint.run_directory import RunDirectory
from train.checkpoint.run_view import Run
from train.commands.evaluate import evaluate_checkpoint
from train.commands.fit import start
from train.config import load as config_load
from train.config.load import LoadedConfig
from train.distributed.world import this_world
from train.exits import Exit, UsageError, repr_of
from train.imports import import_path_restored, importing
from train.process.diagnose import as_run_error, is_lost_peer
from train.process.error_file import write_error_file
from train.process.local_ranks import run_ranks
from train.process.stop import StopRequest, stop_deadline
from train.session import environment_restored, logging_restored, torch_restored
from train.tasks.base import Task

_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")
_log = logging.getLogger("train")
_running = threading.Lock()


@dataclass(frozen=True)
class Result:
    """How a run ended. A run that fails raises an error instead."""

    exit: Exit
    """Exit.DONE: the run is finished. Exit.PREEMPTED: stopped on request and saved; call the
    same again to resume."""
    directory: Path
    """The run directory."""
    step: int
    """Optimiser steps taken, in all attempts together."""
    metrics: dict[str, float]
    """The newest evaluation; empty if there was none."""

    @property
    def run(self) -> Run:
        """The run directory to look at: metrics, checkpoints, attempts."""
        return Run(self.directory)


def load_config(*config: str | Path, task: type[Task] | None = None) -> LoadedConfig:
    """The validated config of files and overrides, with the origin of each value.

    ``task``: the task's class, instead of its name in task.use. Raises UsageError.
    """
    with import_path_restored():
        return _load(config, task, runs=False)


def fit(*config: str | Path, task: type[Task] | None = None, allow_changes: bool = False) -> Result:
    """Starts a run, or resumes the one in its run directory, and trains to the end.

        result = train.fit("configs/text.yaml", "optim.lr=3e-4", task=MyTask)

    Trains in this process, which is the only rank or one of those that torchrun started. Ctrl-C
    finishes the step, saves and returns with ``exit == Exit.PREEMPTED``; a second one raises
    KeyboardInterrupt without saving. In another thread than the main one Python delivers no
    signals: there, create the file ``stop`` in the run directory to stop the run.
    """
    with _one_run("fit"):
        loaded = _load(config, task, runs=True)
        _check_workers(loaded)
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "train.fit runs in a thread, where Python delivers no signals; to stop the run, "
                f"create the file {loaded.run_directory / 'stop'}.",
                RuntimeWarning,
                stacklevel=4,
            )
        stop = StopRequest(loaded.config.stop, in_session=True)
        with torch_restored():
            outcome = start(loaded, stop, allow_changes=allow_changes)
    return Result(outcome.exit, loaded.run_directory, outcome.step, outcome.metrics)


def evaluate(
    *config: str | Path,
    task: type[Task] | None = None,
    checkpoint: str | Path | int = "newest",
    other_data: bool = False,
) -> dict[str, float]:
    """The metrics of a run's checkpoint on all evaluation data.

    A run directory in place of config files stands for the run's own config. ``checkpoint``:
    newest, best, a step, or the path of a checkpoint. ``other_data``: accept another ``data``
    section than that of the run.
    """
    with _one_run("evaluate"):
        files, overrides = _words(config, task)
        with received_runs(files, str(checkpoint), overrides) as (files, which, received):
            loaded = config_load.load_config(
                files, overrides, runs=False, task=task, received=received.artifacts
            )
            _check_workers(loaded)
            with torch_restored():
                return evaluate_checkpoint(
                    loaded, which, other_data=other_data, received=received
                ).metrics


def launch(
    *config: str | Path,
    processes: int,
    task: type[Task] | None = None,
    allow_changes: bool = False,
) -> Result:
    """Trains like ``fit``, on several new processes of this machine.

    The processes import the task by its name, so its class must be at the top of a module or of
    the script that calls this (there under ``if __name__ == "__main__":``), not in a notebook.
    """
    _refuse_during_import("launch")
    if processes < 1:
        raise UsageError(f"processes must be at least 1, but is {processes}.")
    if this_world().world_size > 1:
        raise UsageError(
            "train.launch starts processes of its own, but this process is one of "
            f"{this_world().world_size} ranks (WORLD_SIZE); call train.fit here."
        )
    with import_path_restored():
        loaded = _load(config, task, runs=True)
    config_load.check(loaded.config, loaded.composed, processes)
    if task is not None and (
        loaded.config.task.use.startswith("__main__:") or "<locals>" in task.__qualname__
    ):
        raise UsageError(
            f"The processes of train.launch cannot import the task {task.__qualname__!r}, which "
            "is defined in a notebook or inside a function; put it at the top of a module, or use "
            "train.fit."
        )
    words = ["fit"]
    for file in loaded.files:
        words += ["--config", file]
    words += [*loaded.overrides, *(["--allow-changes"] if allow_changes else [])]
    code = run_ranks(words, processes, grace=stop_deadline(loaded.config.stop))
    if code == Exit.PREEMPTED and not RunDirectory(loaded.run_directory).exists:
        return Result(code, loaded.run_directory, 0, {})  # stopped before the ranks had joined
    run = Run(loaded.run_directory)
    saved = run.checkpoints[-1] if run.checkpoints else None
    end: dict[str, Any] = run.finished or {}
    step = end.get("step", saved.step if saved else 0)
    metrics = end.get("metrics", saved.metrics if saved else {})
    return Result(code, loaded.run_directory, step, dict(metrics))


def _load(config: tuple[str | Path, ...], task: type[Task] | None, *, runs: bool) -> LoadedConfig:
    files, overrides = _words(config, task)
    return config_load.load_config(files, overrides, runs=runs, task=task)


def _words(config: tuple[str | Path, ...], task: type[Task] | None) -> tuple[list[str], list[str]]:
    """The files and the overrides of a call."""
    for item in config:
        if not isinstance(item, (str, Path)):
            raise UsageError(
                f"An argument is a {type(item).__name__} ({item!r:.80}), but a config is given as "
                "files and key=value strings, each an argument of its own; unpack a list, such as "
                "train.fit(*config)."
            )
    words = [(item, isinstance(item, str) and _OVERRIDE.match(item)) for item in config]
    files = [str(item) for item, is_override in words if not is_override]
    overrides = [str(item) for item, is_override in words if is_override]
    if task is not None and not (isinstance(task, type) and issubclass(task, Task)):
        raise UsageError(f"task must be a subclass of train.Task, but is {task!r}.")
    return files, overrides


def _check_workers(loaded: LoadedConfig) -> None:
    """Workers that are not forked import the modules of what they are sent."""
    config = loaded.config.loader
    method = config.multiprocessing_context or multiprocessing.get_start_method()
    if config.workers and method != "fork" and loaded.config.task.use.startswith("__main__:"):
        raise UsageError(
            f"loader.workers is {config.workers}, but the workers ({method}) cannot import the "
            "task, which is defined in a notebook; put it into a module, set "
            "loader.multiprocessing_context=fork, or set loader.workers=0."
        )


def _refuse_during_import(name: str) -> None:
    if module := importing():
        raise UsageError(
            f"train.{name} was called while isorun imports the module {module!r}; put the call "
            'under `if __name__ == "__main__":`.'
        )


@contextmanager
def _one_run(name: str) -> Iterator[None]:
    """Prepares the process for one call of the API, and restores it afterwards."""
    _refuse_during_import(name)
    if not _running.acquire(blocking=False):
        raise UsageError(
            f"train.{name} was called while another run is in progress in this process; wait for "
            "it, or use another process."
        )
    try:
        _check_process_group(name)
        with environment_restored(), logging_restored(), import_path_restored():
            try:
                yield
            except Exception as error:
                if not is_lost_peer(error):
                    write_error_file(error)
                known = as_run_error(error)
                text = known or f"unexpected error: {repr_of(error)}"
                _log.error("%s", text, exc_info=error.__cause__ if known is error else error)
                if known is None or known is error:
                    raise
                raise known from error
    finally:
        _running.release()


def _check_process_group(name: str) -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        raise UsageError(
            f"torch.distributed is initialised in this process, but train.{name} starts the "
            "process group itself; call it before init_process_group, or destroy the group first."
        )
