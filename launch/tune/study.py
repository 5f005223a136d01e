"""A study in its storage: which trial is next, what trials report, and how they end.

All processes that work on a study hold ``study.lock`` while they choose a trial or record an end,
and ``trials/N.lock`` as long as they work on trial N. Both are released by the kernel, so the
trials of a process that was killed are free at once. What is sampled for a trial depends only on
the seed, its number, and the trials that have ended.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from launch.contract import (
    ChoiceDimension,
    Dimension,
    FloatDimension,
    ResumeRefusedError,
    RetryError,
    RunError,
    Space,
    UsageError,
    first_line,
    new_run_id,
    redact,
    slug,
    stored_space,
)
from launch.tune.locks import FileLock
from launch.tune.methods import GridSampler, pruner, sampler
from launch.tune.settings import (
    STUDY_FILE,
    Objective,
    Settings,
    read_record,
    refuse_changes,
    write_record,
)

JOURNAL = "journal.log"
DATABASE = "study.db"
_FILES = {"journal": JOURNAL, "sqlite": DATABASE}
STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
    TrialState.WAITING: "unfinished",
}
_TRIAL_STATES = {name: state for state, name in reversed(STATES.items())}


@dataclass
class Claim:
    """A trial that this process works on."""

    number: int
    directory: Path
    """The run directory."""
    assigned: dict[str, Any]
    """The values of the keys of the space."""
    trial: optuna.Trial
    lock: FileLock
    reported: set[int] = field(default_factory=set)
    """The steps whose evaluation the pruner has."""

    @property
    def pruned_at(self) -> int | None:
        """The step at which it was decided to prune the trial; None if it was not."""
        return self.trial.user_attrs.get("pruned_at")

    @property
    def retries(self) -> int:
        """How often the trial was started again after failures of the infrastructure."""
        return int(self.trial.user_attrs.get("retries", 0))

    def note(self, **values: Any) -> None:
        """Stores facts about the trial, durably."""
        for name, value in values.items():
            self.trial.set_user_attr(name, value)


class StoredStudy:
    """A study to look at."""

    def __init__(
        self,
        directory: Path,
        space: Space,
        objectives: Sequence[Objective],
        study: optuna.Study,
    ) -> None:
        self.directory, self.space, self.objectives = directory, space, objectives
        self.trials_directory = directory / "trials"
        self._study = study

    def trials(self) -> list[FrozenTrial]:
        """All trials by number."""
        with storage_errors():
            return self._study.get_trials(deepcopy=False)

    def best(self) -> list[FrozenTrial]:
        """The best finished trials: one, or with several objectives those that no other surpasses
        in all of them; the best in the first objective comes first."""
        signs = [-1.0 if each.mode == "max" else 1.0 for each in self.objectives]
        costs = {
            each.number: [sign * value for sign, value in zip(signs, each.values, strict=True)]
            for each in self.trials()
            if each.state == TrialState.COMPLETE
        }

        def is_surpassed(cost: list[float]) -> bool:
            return any(
                other != cost and all(o <= c for o, c in zip(other, cost, strict=True))
                for other in costs.values()
            )

        front = [
            each
            for each in self.trials()
            if each.number in costs and not is_surpassed(costs[each.number])
        ]
        front.sort(key=lambda each: (costs[each.number], each.number))
        return front if len(signs) > 1 else front[:1]


class Study(StoredStudy):
    """A study to work on, with the settings of this process."""

    def __init__(self, directory: Path, settings: Settings, storage: str | None) -> None:
        """Opens the study, or creates it. Raises ResumeRefusedError for one with other settings,
        and UsageError or RetryError for a storage that cannot be used."""
        if (directory / "run.json").exists():
            raise UsageError(
                f"run.dir is {str(directory)!r}, which holds a run; choose another directory for "
                "the study."
            )
        try:
            (directory / "trials").mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(directory / "study.lock")
            self._lock.acquire()
        except OSError as error:
            raise UsageError(
                f"run.dir is {str(directory)!r}, which cannot be written ({error.strerror}); "
                "choose another directory."
            ) from None
        try:
            study = _opened(directory, settings, storage)
        finally:
            self._lock.release()
        super().__init__(directory, settings.space, settings.objectives, study)
        self.settings = settings
        self.combinations: list[dict[str, Any]] | None = None
        if settings.sampler == "grid":
            self.combinations = list(self.space.grid())
        self._held: set[int] = set()

    def claim(self, limit: int) -> Claim | None:
        """An unfinished trial that no process works on, else a new one if there are fewer than
        ``limit``; None without either."""
        with storage_errors(), self._lock:
            trials = self._study.get_trials(deepcopy=False)
            for frozen in trials:
                unfinished = not frozen.state.is_finished() and frozen.number not in self._held
                if unfinished and (lock := self._locked(frozen.number)):
                    return self._claimed(optuna.Trial(self._study, frozen._trial_id), lock)
            if len(trials) >= limit:
                return None
            self._use_methods(len(trials), 0)
            trial = self._study.ask()
            lock = self._locked(trial.number)
            assert lock is not None, "only the holder of study.lock takes the locks of trials"
            return self._claimed(trial, lock)

    def report(self, claim: Claim, step: int, value: float) -> None:
        """Gives the pruner an evaluation, unless it has it."""
        if step in claim.reported:
            return
        with storage_errors():
            claim.trial.report(value, step)
        claim.reported.add(step)

    def should_prune(self, claim: Claim) -> bool:
        """Whether the pruner wants to end the trial after its newest evaluation."""
        with storage_errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._use_methods(claim.number, 0)
            return bool(claim.reported) and claim.trial.should_prune()

    def settle(self, claim: Claim, state: str, values: list[float] | None = None) -> None:
        """Records the end of a trial and gives it up."""
        with storage_errors(), self._lock:
            self._use_methods(claim.number, 0)
            self._study.tell(claim.trial, values, _TRIAL_STATES[state])
            self.give_up(claim)

    def give_up(self, claim: Claim) -> None:
        """Leaves a trial as it is, to whatever process takes it next."""
        claim.lock.release()
        self._held.discard(claim.number)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process records the end of a trial meanwhile."""
        with self._lock:
            yield

    def _locked(self, number: int) -> FileLock | None:
        lock = FileLock(self.trials_directory / f"{number:04}.lock")
        if not lock.acquire(wait=False):
            return None
        self._held.add(number)
        return lock

    def _claimed(self, trial: optuna.Trial, lock: FileLock) -> Claim:
        number = trial.number
        reported = {
            step for each in self._study.get_trials(deepcopy=False) if each.number == number
            for step in each.intermediate_values
        }  # fmt: skip
        directory = self.trials_directory / f"{number:04}"
        return Claim(number, directory, self._sampled(trial), trial, lock, reported)

    def _sampled(self, trial: optuna.Trial) -> dict[str, Any]:
        """The values of a trial; those that it has already are kept."""
        assigned: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._use_methods(trial.number, 0)
            _ = trial.relative_params  # of keys that are sampled together, with this seed
            for index, dimension in enumerate(self.space.dimensions, 1):
                if self.space.is_active(dimension, assigned):
                    self._use_methods(trial.number, index)
                    assigned[dimension.key] = _suggested(trial, dimension)
        return assigned

    def _use_methods(self, number: int, index: int) -> None:
        """New ones for each use, so that nothing depends on what this process did before."""
        if self.combinations is not None:
            keys = {each.key: each for each in self.space.dimensions}
            self._study.sampler = GridSampler(
                [{key: _label(keys[key], value) for key, value in each.items()}
                 for each in self.combinations]
            )  # fmt: skip
        else:
            seed = zlib.crc32(f"{self.settings.seed}/{number}/{index}".encode())
            self._study.sampler = sampler(self.settings.sampler, seed)
        self._study.pruner = pruner(self.settings.pruner)


def _opened(directory: Path, settings: Settings, storage: str | None) -> optuna.Study:
    """The study of the directory, which is created where it does not exist."""
    record = read_record(directory)
    if record is None:
        storage = storage or "journal"
        base = settings.base.config.run.name
        name = slug(base) if storage in _FILES else new_run_id(base)
        study = _create(directory, settings, name, storage)
        write_record(directory, settings, name, storage)
        return study
    study = load_study(directory, record, storage)
    with storage_errors():
        trials = study.get_trials(deepcopy=False)
    reported = any(each.intermediate_values or each.values for each in trials)
    refuse_changes(directory, settings, record, may_rename=not reported)
    name, place = str(record["name"]), str(record["storage"])
    write_record(directory, settings, name, place, record["created"])
    return study


def open_stored(directory: Path, storage: str | None) -> StoredStudy:
    """The study in a directory, to look at. Raises RunError."""
    record = read_record(directory)
    if record is None:
        raise UsageError(
            f"There is no study in {directory}: it has no {STUDY_FILE}; name the directory of a "
            "study."
        )
    path = str(directory / STUDY_FILE)
    try:
        objectives = [Objective(str(name), str(mode)) for name, mode in record["objectives"]]
        space = stored_space(record["space"], path)
    except (UsageError, TypeError, ValueError) as error:
        raise ResumeRefusedError(
            f"{path} is damaged ({first_line(error)}); restore it from a backup."
        ) from None
    return StoredStudy(directory, space, objectives, load_study(directory, record, storage))


def load_study(directory: Path, record: Mapping[str, Any], storage: str | None) -> optuna.Study:
    """The study of a record. ``storage``: the word on the command line. Raises RunError."""
    stored = str(record["storage"])
    if storage is not None and redact(storage) != stored:
        raise ResumeRefusedError(
            f"--storage is {redact(storage)!r}, but the study in {directory} is in {stored!r}; "
            "leave the option out, or choose another run.dir for a new study."
        )
    if storage is None and "***" in stored:
        raise UsageError(
            f"The study in {directory} is in {stored!r}, whose secrets are not recorded; give the "
            "whole URL as --storage."
        )
    with storage_errors():
        try:
            return optuna.load_study(
                study_name=str(record["name"]),
                storage=_storage(directory, storage or stored),
                sampler=optuna.samplers.RandomSampler(),
            )
        except KeyError:
            raise ResumeRefusedError(
                f"The storage {stored!r} has no study {record['name']!r}, which "
                f"{directory / 'study.json'} names; restore the storage, or choose another "
                "run.dir for a new study."
            ) from None


def _create(directory: Path, settings: Settings, name: str, storage: str) -> optuna.Study:
    with storage_errors():
        return optuna.create_study(
            study_name=name,
            storage=_storage(directory, storage),
            directions=[
                "maximize" if each.mode == "max" else "minimize" for each in settings.objectives
            ],
            sampler=optuna.samplers.RandomSampler(),
            load_if_exists=storage in _FILES,  # of a process that was killed before the record
        )


class _JournalLock(JournalFileOpenLock):
    """Released by the kernel when its holder is killed. Optuna's own would block for 30 s."""

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self._journal = journal
        self._lock = FileLock(journal.with_name(f"{journal.name}.lock"))

    def acquire(self) -> bool:
        """Takes it, and removes an incomplete last line, which a crash of the machine left."""
        self._lock.acquire()
        with self._journal.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if end and file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Releases it."""
        self._lock.release()


def _storage(directory: Path, word: str) -> BaseStorage:
    if word == "journal":
        path = directory / JOURNAL
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))
    if word == "sqlite":
        return RDBStorage(
            f"sqlite:///{(directory / DATABASE).absolute()}",
            engine_kwargs={"connect_args": {"timeout": 60}},
        )
    if "://" not in word:
        raise UsageError(
            f"--storage is {redact(word)!r}, but must be journal, sqlite, or the URL of a database "
            "such as postgresql://HOST/NAME."
        )
    return RDBStorage(word)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns errors of storages into one sentence. Raises UsageError and RetryError."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        known = _storage_error(error)
        if known is error:
            raise
        raise known from error


def _storage_error(error: Exception) -> Exception:
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    text = redact(first_line(error.__cause__ or error))
    if isinstance(error, ArgumentError | NoSuchModuleError | ImportError):
        return UsageError(
            f"The storage of the study cannot be used ({text}); correct --storage, or install the "
            "driver of the database."
        )
    if isinstance(error, SQLAlchemyError | optuna.exceptions.StorageInternalError | OSError):
        return RetryError(
            f"The storage of the study failed ({text}); nothing is lost: fix the cause, then rerun."
        )
    if isinstance(error, json.JSONDecodeError | optuna.exceptions.OptunaError):
        return ResumeRefusedError(
            f"The storage of the study is damaged ({text}); restore it from a backup, or choose "
            "another run.dir for a new study."
        )
    return error


def _suggested(trial: optuna.Trial, dimension: Dimension) -> Any:
    key, form = dimension.key, dimension.form
    if isinstance(form, ChoiceDimension):
        by_label = {_label(dimension, choice): choice for choice in form.choices}
        return by_label[trial.suggest_categorical(key, list(by_label))]
    if isinstance(form, FloatDimension):
        return trial.suggest_float(key, form.low, form.high, step=form.step, log=form.log)
    return trial.suggest_int(key, form.low, form.high, step=form.step, log=form.log)


def assigned_in(space: Space, frozen: FrozenTrial) -> dict[str, Any]:
    """The values of a stored trial by key."""
    found: dict[str, Any] = {}
    for each in space.dimensions:
        if each.key not in frozen.params:
            continue
        value = frozen.params[each.key]
        if isinstance(each.form, ChoiceDimension):
            value = {_label(each, choice): choice for choice in each.form.choices}[value]
        found[each.key] = value
    return found


def _label(dimension: Dimension, value: Any) -> Any:
    """What the storage has for a value: a text for each choice, since storages and Optuna's own
    tools take only texts and numbers, and true and 1 as the same."""
    if not isinstance(dimension.form, ChoiceDimension):
        return value
    choices = dimension.form.choices
    plain = isinstance(value, str) and value not in [
        json.dumps(each) for each in choices if not isinstance(each, str)
    ]
    return value if plain else json.dumps(value, ensure_ascii=False)
