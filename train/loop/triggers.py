"""When to log, evaluate and save: rules on the step, the same on every rank."""

from __future__ import annotations

import time

from train.checkpoint.checkpoint_config import CheckpointConfig
from train.config.schema import EvaluateConfig
from train.data.epochs import completes, samples_in
from train.track.track_config import TrackConfig


class Triggers:
    """Decides after each step what to do next.

    ``batch_size`` is the global one and ``dataset_size`` that of the training data.
    """

    def __init__(
        self,
        *,
        track: TrackConfig,
        evaluate: EvaluateConfig,
        checkpoint: CheckpointConfig,
        total_steps: int,
        batch_size: int,
        dataset_size: int,
    ) -> None:
        self._track, self._evaluate, self._checkpoint = track, evaluate, checkpoint
        self._total_steps, self._batch_size = total_steps, batch_size
        epochs = evaluate.every_epochs
        self._evaluation_period = samples_in(epochs, dataset_size) if epochs else None
        self._checkpoint_started_at = time.monotonic()

    def log(self, step: int) -> bool:
        """Every ``track.log_every_steps``, and after the first and the last step."""
        return step % self._track.log_every_steps == 0 or step in (1, self._total_steps)

    def histograms(self, step: int) -> bool:
        """Whether to track histograms of the weights and gradients of this step."""
        every = self._track.histograms_every_steps
        return every is not None and step % every == 0

    def evaluate(self, step: int, position: int) -> bool:
        """By steps, by epochs, and at the end. ``position``: samples that were taken so far."""
        every_steps, period = self._evaluate.every_steps, self._evaluation_period
        if every_steps and step % every_steps == 0:
            return True
        if period and completes(period, position, self._batch_size):
            return True
        return self._evaluate.at_end and step == self._total_steps

    def save(self, step: int) -> bool:
        """By steps alone; only rank 0 decides by time, with ``time_to_save``."""
        every = self._checkpoint.every_steps
        return every is not None and step % every == 0 and step != self._total_steps

    def time_to_save(self) -> bool:
        """Whether ``checkpoint.every_minutes`` have passed on the clock of this process."""
        minutes = self._checkpoint.every_minutes
        elapsed = time.monotonic() - self._checkpoint_started_at
        return minutes is not None and elapsed >= 60 * minutes

    def checkpoint_started(self) -> None:
        """Restarts the clock of ``time_to_save``."""
        self._checkpoint_started_at = time.monotonic()
