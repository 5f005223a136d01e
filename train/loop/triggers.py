"""When to log, evaluate and save: rules on the step, the same on every rank."""

from __future__ import annotations

import time

from train.config.schema import Config


class Due:
    """Answers, after each step, what is to be done now."""

    def __init__(self, config: Config, total_steps: int, dataset_size: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.batch_size, self.dataset_size = config.batch.global_batch_size, dataset_size
        self.evaluated_step: int | None = None
        self._saved_at = time.monotonic()

    def log(self, step: int) -> bool:
        """Also after the first step of all, so that a person sees early that it runs."""
        return step % self.config.track.log_every_steps == 0 or step in (1, self.total_steps)

    def histograms(self, step: int) -> bool:
        """Whether weights and gradients of this step are to be drawn."""
        every = self.config.track.histograms_every_steps
        return every is not None and step % every == 0

    def evaluate(self, step: int) -> bool:
        """By steps, by epochs, and at the end."""
        rules = self.config.evaluate
        if rules.every_steps and step % rules.every_steps == 0:
            return True
        if rules.every_epochs:
            period = rules.every_epochs * self.dataset_size
            before, after = (step - 1) * self.batch_size, step * self.batch_size
            if int(after // period) > int(before // period):
                return True
        return rules.at_end and step == self.total_steps

    def save(self, step: int) -> bool:
        """By steps alone; time is ``time_to_save``, which only rank 0 may judge."""
        every = self.config.checkpoint.every_steps
        return every is not None and step % every == 0 and step != self.total_steps

    def time_to_save(self) -> bool:
        """Whether enough minutes have passed on this process's clock."""
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def saved(self) -> None:
        """A checkpoint was just started."""
        self._saved_at = time.monotonic()
