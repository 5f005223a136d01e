"""A study in its storage: which trial is next, what trials report, and how they end.

All processes that work on a study hold ``study.lock`` while they choose a trial or record an end,
and ``trials/N.lock`` as long as they work on trial N. Both are released by the kernel, so the
trials of a process that was killed are free at once. What is sampled for a trial depends only on
the seed, its number, and the trials that have ended.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from launch.contract import (
    ResumeRefusedError,
    Space,
    UsageError,
    first_line,
    new_run_id,
    slug,
    stored_space,
)
from launch.tune.halving import HalvingPruner, RungTrial
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
from launch.tune.storage import FILES, create_study, load_study, storage_errors
from launch.tune.values import label, suggested

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

    @property
    def promoted(self) -> int:
        """How often the trial went on after a pause at a rung."""
        return int(self.trial.user_attrs.get("promoted", 0))

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
        methods: tuple[str, str],
        study: optuna.Study,
    ) -> None:
        """``methods``: the words of the sampler and the pruner."""
        self.directory, self.space, self.objectives = directory, space, objectives
        self.sampler, self.pruner = methods
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

    def run_directory(self, number: int) -> Path:
        """The run directory of a trial."""
        return self.trials_directory / f"{number:04}"

    def importance(self, objective: int, good: float) -> dict[str, float]:
        """The share of each key in what makes the best trials, by the index of an objective;
        ``good``: the best trials, as a part of the finished ones. Raises ImportError."""
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        sign = -1.0 if self.objectives[objective].mode == "max" else 1.0

        def cost(trial: FrozenTrial) -> float:
            return sign * float(trial.values[objective])

        with storage_errors():
            return get_param_importances(
                self._study,
                evaluator=PedAnovaImportanceEvaluator(target_quantile=good),
                target=cost,
            )


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
    methods = str(record["sampler"]), str(record["pruner"])
    study = load_study(directory, record, storage)
    return StoredStudy(directory, space, objectives, methods, study)


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
        methods = settings.sampler, settings.pruner
        super().__init__(directory, settings.space, settings.objectives, methods, study)
        self.settings = settings
        self.combinations: list[dict[str, Any]] | None = None
        if settings.sampler == "grid":
            self.combinations = list(self.space.grid())
        method = pruner(settings.pruner)
        self.halving = method if isinstance(method, HalvingPruner) else None
        """The rungs at which trials pause; None for trials that run to their end."""
        self._held: set[int] = set()

    def claim(self, limit: int) -> Claim | None:
        """An unfinished trial that no process works on, else a paused one that goes on, else a new
        one if there are fewer than ``limit``; None without any."""
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
            self._use_methods(len(trials), 0)
            trial = self._study.ask()
            lock = self._locked(trial.number)
            assert lock is not None, "only the holder of study.lock takes the locks of trials"
            return self._claimed(trial, lock)

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
        if self.combinations is not None:
            keys = {each.key: each for each in self.space.dimensions}
            self._study.sampler = GridSampler(
                [{key: label(keys[key], value) for key, value in each.items()}
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
        name = slug(base) if storage in FILES else new_run_id(base)
        study = create_study(directory, settings, name, storage)
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


def _is_paused(frozen: FrozenTrial) -> bool:
    """Whether a trial waits at a rung."""
    facts = frozen.user_attrs
    return not frozen.state.is_finished() and facts.get("paused") == facts.get("promoted", 0)


def _rung_trial(frozen: FrozenTrial) -> RungTrial:
    promoted = int(frozen.user_attrs.get("promoted", 0))
    return RungTrial(frozen.number, frozen.intermediate_values, promoted, _is_paused(frozen))
