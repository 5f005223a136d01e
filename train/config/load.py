"""Loads and checks the config of a command line, without slow imports."""

from __future__ import annotations

import errno
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from train.checkpoint.run_directory import RunDirectory
from train.config.compose import Composed, compose, placed
from train.config.explain import explain
from train.config.schema import Config, TaskConfig, config_class
from train.config.trust import TASK_SECTIONS, refuse_code_of_others
from train.data.plan import BatchPlan
from train.distributed.world import this_world
from train.exits import RetryError, UsageError
from train.hooks import find_hooks
from train.process.diagnose import fault_of
from train.program import typed_command
from train.secrets import redact_command
from train.tasks.base import Task
from train.tasks.registry import check_task, find_task, reference_of
from train.track.sinks import find_sinks

_LONGEST = 4095 - 255
"""Bytes of the path of a run directory: Linux takes 4095, and a file inside needs the rest."""
_VARIABLE = re.compile(r"\$([A-Za-z_]\w*)")


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config, the class of its task, and the origin of each value."""

    config: Config
    task: type[Task]
    composed: Composed
    files: tuple[str, ...]
    overrides: tuple[str, ...]
    start: Path
    """The working directory in which the config was loaded."""

    def command(self, name: str) -> str:
        """The command line that applies another command to the same run."""
        if self.config.task.use.startswith("__main__:"):  # no other process can import it
            if name == "fit":
                return "call train.fit again"
            return f"put the task into a module to use `{shlex.join(typed_command(name))}`"
        words = typed_command(name)
        if name != "fit":  # the others take the directory of a run in place of its config
            directory = str(self.run_directory_as_set)
            return shlex.join([*words, f"./{directory}" if directory[0] == "-" else directory])
        for file in self.files:
            words += ["--config", file]
        return shlex.join(redact_command([*words, *self.overrides]))

    @property
    def run_directory(self) -> Path:
        """The directory that holds all files of the run: an absolute path, because the user's code
        may change the working directory."""
        return self.start / self.run_directory_as_set

    @property
    def run_directory_as_set(self) -> Path:
        """The same as the config sets it, so possibly relative; for messages and commands."""
        return _run_directory(self.config)

    def values(self) -> dict[str, Any]:
        """The resolved config as plain values, defaults included."""
        return self.config.model_dump()


def load_config(
    files: Sequence[str],
    overrides: Sequence[str],
    *,
    runs: bool = True,
    task: type[Task] | None = None,
    places: Mapping[str, str] | None = None,
    received: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Reads, merges and validates; with ``runs``, also makes the checks of a training run.

    ``task`` is the task's class, if the caller has it: task.use is then its name, and nothing is
    imported. A run directory among the files stands for the config of its run. ``received``: the
    run directories that came from elsewhere, with their artifact. ``places`` has the origin of
    overrides that come from elsewhere than the command line, by key. Raises UsageError with one
    sentence per problem. Code that the config of another user's run names is refused. The general
    sections are validated before the task's module is imported, so that a typo is reported at once.
    """
    start = Path.cwd()  # before the task's module is imported, which may change it
    files, overrides, stored = _of_runs(files, overrides)
    if task is not None:
        reference = reference_of(task)
        check_task(task, f"task is {reference}")
        overrides = [*overrides, f"task.use={reference}"]
    composed = placed(compose(files, overrides, stored), places or {})
    configs = {str(Path(name) / "config.json"): of for name, of in (received or {}).items()}
    refuse_code_of_others(composed, None if runs else (*TASK_SECTIONS, "strategy"), configs)
    general = _validate(Config, composed, composed.values)
    task_values = composed.values.get("task")
    use = task_values.get("use") if isinstance(task_values, dict) else task_values
    if not isinstance(use, str):
        _validate(
            TaskConfig, composed, task_values if isinstance(task_values, dict) else {}, "task."
        )
    if task is None:
        task = find_task(str(use), composed.origin("task.use"))
    config = _validate(config_class(task), composed, composed.values)
    if runs:
        check(config, composed)
        if this_world().rank == 0:
            _check_writable(start / _run_directory(config), composed)
    assert isinstance(general, Config)
    assert isinstance(config, Config)
    return LoadedConfig(config, task, composed, tuple(files), tuple(overrides), start)


def find_run_directory(files: Sequence[str], overrides: Sequence[str]) -> Path:
    """The run directory of a config, without an import of its task's module. Raises UsageError."""
    composed = compose(*_of_runs(files, overrides))
    return _run_directory(_validate(Config, composed, composed.values))


def _of_runs(
    files: Sequence[str], overrides: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """Replaces each run directory among the files by the config that its run was last started
    with, and sets run.dir to it. Returns the files, the overrides, and those configs."""
    found: list[str] = []
    directories: list[str] = []
    configs: list[str] = []
    for name in files:
        stored = Path(name) / "config.json"
        if Path(name).is_dir() and not stored.exists():
            is_checkpoint = (Path(name) / "manifest.json").exists()
            raise UsageError(
                f"{name!r} is a directory without config.json, so it is not that of a run; "
                + (
                    "name the run, and the checkpoint with --checkpoint."
                    if is_checkpoint
                    else "name a run directory or a config file."
                )
            )
        if stored.exists() and configs and Path(configs[0]) != stored:
            raise UsageError(
                f"{Path(configs[0]).parent} and {name} are both directories of runs; name one."
            )
        if stored.exists():
            RunDirectory(Path(name)).stored_config()  # raises if it is a link or no JSON object
            directories.append(f"run.dir={name}")
            configs.append(str(stored))
        found.append(str(stored) if stored.exists() else name)
    return found, [*directories, *overrides], configs


def task_config(values: dict[str, Any], origin: str, task: type[Task] | None = None) -> Task:
    """The task of a resolved config that was stored, such as in an export; of the class ``task``,
    by default the one that the config names."""
    composed = Composed(values, dict.fromkeys(values, origin))
    task = task or find_task(str(values["task"]["use"]), origin)
    return task(_validate(config_class(task), composed, values))


def _validate(model: Any, composed: Composed, values: Any, prefix: str = "") -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, model, composed, prefix) from None


def check(config: Config, composed: Composed, world_size: int | None = None) -> None:
    """Checks what depends on several sections, and the code of hooks and sinks, which it imports.
    ``world_size``: by default that of this process."""
    refuse_code_of_others(composed)
    world_size = world_size or this_world().world_size
    find_hooks(config.hooks, composed.origin("hooks"))
    find_sinks(config.track.sinks, composed.origin("track.sinks"))
    BatchPlan.from_config(config.batch, world_size)
    steps = config.length.steps
    if steps is not None:
        check_length(config, composed, steps)
    evaluates = (
        config.evaluate.every_steps or config.evaluate.every_epochs or config.evaluate.at_end
    )
    for field, wanted in (
        ("early_stop", config.early_stop),
        ("checkpoint.keep_best", config.checkpoint.keep_best),
    ):
        if wanted is not None and not evaluates:
            raise UsageError(
                f"{field} is set ({composed.origin(field)}), but the config has no evaluation; "
                "set evaluate.every_steps or evaluate.every_epochs."
            )


def check_length(config: Config, composed: Composed, total_steps: int) -> None:
    """Checks that the schedule fits into the run. With length.epochs, ``total_steps`` is known
    only once the data is loaded."""
    length = "length.steps" if config.length.steps is not None else "length.epochs"
    for field in ("warmup_steps", "decay_steps"):
        value = getattr(config.schedule, field)
        if value is not None and value > total_steps:
            raise UsageError(
                f"schedule.{field} is {value} ({composed.origin(f'schedule.{field}')}), which is "
                f"longer than the run of {total_steps} steps "
                f"({composed.origin(length)}); lower it, or make the run longer."
            )
    decay = config.schedule.decay_steps
    if (
        config.schedule.use == "wsd"
        and decay
        and decay + config.schedule.warmup_steps > total_steps
    ):
        raise UsageError(
            f"schedule.warmup_steps ({config.schedule.warmup_steps}) and schedule.decay_steps "
            f"({decay}, {composed.origin('schedule.decay_steps')}) together are longer than the "
            f"run of {total_steps} steps; lower one of them, or make the run longer."
        )


def _run_directory(config: Config) -> Path:
    return Path(config.run.dir or Path("runs") / config.run.name)


def _check_writable(directory: Path, composed: Composed) -> None:
    """Checks that the run directory, or its nearest existing parent, is writable, and that the
    paths of its files will not be too long. Raises UsageError, or RetryError on a full disk."""
    length = len(os.fsencode(directory))
    if length > _LONGEST:
        raise UsageError(
            f"run.dir ({composed.where('run.dir')}) is a path of {length} bytes, so that those of "
            f"its files would be too long; choose one of at most {_LONGEST}."
        )
    if (name := _VARIABLE.search(str(directory))) and not directory.exists():
        raise UsageError(
            f"run.dir is {str(directory)!r} ({composed.where('run.dir')}), in which {name[0]} "
            f"is not replaced by a value; write ${{oc.env:{name[1]}}} for that of the environment "
            "variable."
        )
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        # By writing: permission bits do not show root's rights or read-only mounts.
        tempfile.TemporaryDirectory(dir=existing, prefix=".isorun-").cleanup()
    except OSError as error:
        text = (
            f"run.dir is {str(directory)!r} ({composed.where('run.dir')}), but {existing} is "
            f"not writable: {error.strerror}; "
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RetryError(f"{text}free some space, then rerun.") from None
        raise fault_of(error, UsageError(f"{text}choose another directory.")) from None
