"""A study in its storage: which trial is next, what trials report, and how they end.

All processes that work on a study hold ``study.lock`` while they choose a trial or record an end,
and ``trials/N.lock`` as long as they work on trial N. Both are released by the kernel, so the
trials of a process that was killed are free at once. What is sampled for a trial depends only on
the seed, its number, and the trials that have ended.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from launch.contract import (
    ResumeRefusedError,
    UsageError,
    fault_of,
    new_run_id,
    slug,
)
from launch.tune.halving import HalvingPruner, RungTrial
from launch.tune.locks import FileLock
from launch.tune.methods import GridSampler, is_grid, pruner, sampler, wandb_method
from launch.tune.settings import (
    STUDY_FILE,
    Settings,
    read_record,
    refuse_changes,
    write_record,
)
from launch.tune.storage import FILES, create_study, load_study, storage_errors
from launch.tune.stored_study import STATES, StoredStudy
from launch.tune.sweep_config import given_values, sweep_config
from launch.tune.values import distribution, label, suggested
from launch.tune.wandb_sweep import GivenRun, create_sweep

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
    def wandb_run(self) -> str | None:
        """The id of its W&B run, if W&B's sweep has given the trial."""
        return self.trial.user_attrs.get("wandb_run")

    @property
    def pruned_at(self) -> int | None:
        """The step at which it was decided to prune the trial; None if it was not."""
        return self.trial.user_attrs.get("pruned_at")

    @property
    def retries(self) -> int:
        """How often the trial was started again after failures of the infrastructure."""
        return int(self.trial.user_attrs.get("retries", 0))

    @property
    def promoted(self) -> int:
        """How often the trial went on after a pause at a rung."""
        return int(self.trial.user_attrs.get("promoted", 0))

    def note(self, **values: Any) -> None:
        """Stores facts about the trial, durably."""
        for name, value in values.items():
            self.trial.set_user_attr(name, value)


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
            wrong = UsageError(
                f"run.dir is {str(directory)!r}, which cannot be written ({error.strerror}); "
                "choose another directory."
            )
            raise fault_of(error, wrong) from None
        try:
            study, self.sweep = _opened(directory, settings, storage)
        finally:
            self._lock.release()
        methods = settings.sampler, settings.pruner
        super().__init__(directory, settings.space, settings.objectives, methods, study)
        self.settings = settings
        self.combinations: list[dict[str, Any]] | None = None
        """Those of a grid."""
        if is_grid(settings.sampler):
            self.combinations = list(self.space.grid())
        method = pruner(settings.pruner)
        self.halving = method if isinstance(method, HalvingPruner) else None
        """The rungs at which trials pause; None for trials that run to their end."""
        self._held: set[int] = set()

    def claim(
        self, limit: int, given: Callable[[], GivenRun | None] = lambda: None
    ) -> Claim | None:
        """An unfinished trial that no process works on, else a paused one that goes on, else a new
        one if there are fewer than ``limit``; None without any. With a sweep of W&B, ``given``
        returns the next run that it has given, or None."""
        with storage_errors(), self._lock:
            trials = self._study.get_trials(deepcopy=False)
            for frozen in trials:
                unfinished = not frozen.state.is_finished() and frozen.number not in self._held
                if unfinished and not _is_paused(frozen) and (lock := self._locked(frozen.number)):
                    return self._claimed(optuna.Trial(self._study, frozen._trial_id), lock)
            if self.halving and (claim := self._promoted(self.halving, trials, limit)):
                return claim
            if len(trials) >= limit:
                return None
            if self.sweep is not None:
                trial = self._given(given(), self.sweep)
            else:
                self._use_methods(len(trials), 0)
                trial = self._study.ask()
            if trial is None:
                return None
            lock = self._locked(trial.number)
            assert lock is not None, "only the holder of study.lock takes the locks of trials"
            return self._claimed(trial, lock)

    def _given(self, run: GivenRun | None, sweep: str) -> optuna.Trial | None:
        """A new trial with the values that the sweep gives; one operation of the storage, so that
        no trial is without them."""
        if run is None:
            return None
        self._study.add_trial(
            optuna.create_trial(
                state=TrialState.RUNNING,
                params=given_values(self.space, run.arguments, sweep),
                distributions={each.key: distribution(each) for each in self.space.dimensions},
                user_attrs={"wandb_run": run.id},
            )
        )
        newest = self._study.get_trials(deepcopy=False)[-1]
        return optuna.Trial(self._study, newest._trial_id)

    def _promoted(
        self, halving: HalvingPruner, trials: Sequence[FrozenTrial], limit: int
    ) -> Claim | None:
        """A paused trial that goes on. Once none does any more, all that are paused are pruned."""
        running = [
            each for each in trials
            if not each.state.is_finished()
            and (not _is_paused(each) or each.number in self._held)
        ]  # fmt: skip
        is_complete = len(trials) >= limit and not running
        candidates = halving.promotable(
            [_rung_trial(each) for each in trials if each.state != TrialState.FAIL],
            self.objectives[0].mode,
            at_least_one=is_complete,
        )
        for each in candidates:
            if each.number not in self._held and (lock := self._locked(each.number)):
                claim = self._claimed(
                    optuna.Trial(self._study, trials[each.number]._trial_id), lock
                )
                claim.note(promoted=claim.promoted + 1)
                return claim
        if is_complete and not candidates:
            for frozen in trials:
                if _is_paused(frozen) and (lock := self._locked(frozen.number)):
                    paused = self._claimed(optuna.Trial(self._study, frozen._trial_id), lock)
                    self._settle(paused, "pruned")
        return None

    def write_parameters(self, claim: Claim) -> Path:
        """Writes the values of a trial as W&B's client reads those of a sweep; returns the file.
        They are in the config of the W&B run under their dotted keys."""
        path = (self.trials_directory / f"{claim.number:04}.wandb.yaml").absolute()
        values = {key: {"value": value} for key, value in claim.trial.params.items()}
        path.write_text(yaml.safe_dump({"wandb_version": 1, **values}))
        return path

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
            self._settle(claim, state, values)

    def _settle(self, claim: Claim, state: str, values: list[float] | None = None) -> None:
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
        return Claim(
            number, self.run_directory(number), self._sampled(trial), trial, lock, reported
        )

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
                    assigned[dimension.key] = suggested(trial, dimension)
        return assigned

    def _use_methods(self, number: int, index: int) -> None:
        """New ones for each use, so that nothing depends on what this process did before."""
        if self.sweep is not None:
            self._study.sampler = optuna.samplers.RandomSampler()  # of which nothing is asked
        elif self.combinations is not None:
            keys = {each.key: each for each in self.space.dimensions}
            self._study.sampler = GridSampler(
                [{key: label(keys[key], value) for key, value in each.items()}
                 for each in self.combinations]
            )  # fmt: skip
        else:
            seed = zlib.crc32(f"{self.settings.seed}/{number}/{index}".encode())
            self._study.sampler = sampler(self.settings.sampler, seed)
        self._study.pruner = pruner(self.settings.pruner)


def _opened(
    directory: Path, settings: Settings, storage: str | None
) -> tuple[optuna.Study, str | None]:
    """The study of the directory, and its sweep of W&B. They are created where they do not
    exist."""
    record = read_record(directory)
    if record is None:
        storage = storage or "journal"
        base = settings.base.config.run.name
        name = slug(base) if storage in FILES else new_run_id(base)
        sweep = None
        if method := wandb_method(settings.sampler):
            track = settings.base.config.track
            config = sweep_config(settings, method, base)
            sweep = create_sweep(config, track.wandb_project, track.wandb_entity)
        study = create_study(directory, settings, name, storage)
        write_record(directory, settings, name, storage, sweep=sweep)
        return study, sweep
    study = load_study(directory, record, storage)
    with storage_errors():
        trials = study.get_trials(deepcopy=False)
    reported = any(each.intermediate_values or each.values for each in trials)
    refuse_changes(directory, settings, record, may_rename=not reported)
    name, place = str(record["name"]), str(record["storage"])
    sweep = _stored_sweep(directory, record)
    write_record(directory, settings, name, place, record["created"], sweep=sweep)
    return study, sweep


def _stored_sweep(directory: Path, record: Mapping[str, Any]) -> str | None:
    sweep = record.get("wandb_sweep")
    is_wanted = bool(wandb_method(str(record["sampler"])))
    is_path = isinstance(sweep, str) and re.fullmatch(r"[^/\s]*/[^/\s]+/[^/\s]+", sweep)
    if bool(is_path) != is_wanted:
        raise ResumeRefusedError(
            f"{directory / STUDY_FILE} is damaged (wandb_sweep); restore it from a backup, or "
            "choose another run.dir for a new study."
        )
    return sweep


def _is_paused(frozen: FrozenTrial) -> bool:
    """Whether a trial waits at a rung."""
    facts = frozen.user_attrs
    return not frozen.state.is_finished() and facts.get("paused") == facts.get("promoted", 0)


def _rung_trial(frozen: FrozenTrial) -> RungTrial:
    promoted = int(frozen.user_attrs.get("promoted", 0))
    return RungTrial(frozen.number, frozen.intermediate_values, promoted, _is_paused(frozen))
