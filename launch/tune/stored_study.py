"""A study as it is stored, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from launch.contract import ResumeRefusedError, Space, UsageError, first_line, stored_space
from launch.tune.settings import STUDY_FILE, Objective, read_record
from launch.tune.storage import load_study, storage_errors

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
    TrialState.WAITING: "unfinished",
}


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
