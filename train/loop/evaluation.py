"""Evaluations during a run, with the average of weights where the run keeps one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from train.data.loader import Batches
from train.loop.evaluate import EvaluationStoppedError, evaluate, make_report
from train.optim.ema import Ema
from train.strategies.base import Strategy
from train.tasks.base import Task


class EvaluationResult(NamedTuple):
    """What one evaluation returned."""

    metrics: dict[str, float]
    report: dict[str, Any]
    """The task's texts and images, by name."""


class Evaluation:
    """Evaluates the model of a run. ``batches`` is one pass over the evaluation data, which can
    be entered again; ``stop`` says whether this rank was asked to stop."""

    def __init__(
        self,
        task: Task,
        strategy: Strategy,
        ema: Ema | None,
        batches: Batches,
        *,
        seed: int,
        stop: Callable[[], bool],
        beat: Callable[[str], None],
    ) -> None:
        self._task, self._strategy, self._ema, self._batches = task, strategy, ema, batches
        self._seed, self._stop, self._beat = seed, stop, beat

    def run(self) -> EvaluationResult | None:
        """Evaluates; collective. Returns None where a rank was asked to stop meanwhile."""
        strategy, engine = self._strategy, self._strategy.engine

        def stop() -> bool:
            self._beat("evaluating a batch")
            return self._stop()

        strategy.sync_buffers()
        strategy.call_record.clear()
        with self._ema.applied() if self._ema else nullcontext(), self._batches as batches:
            try:
                metrics = evaluate(
                    engine, strategy.call, strategy.bare_model, self._task, batches,
                    seed=self._seed, stop=stop,
                )  # fmt: skip
            except EvaluationStoppedError:
                return None
            self._beat("reporting")
            report = make_report(engine, strategy.call, strategy.bare_model, self._task, self._seed)
            strategy.check_calls()
        return EvaluationResult(metrics, report)
