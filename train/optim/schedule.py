"""Learning-rate schedules: pure functions of the step, without state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator

from train.section import Section


class ScheduleConfig(Section):
    """The learning rate over the run, as a factor on ``optim.lr``."""

    use: Literal["constant", "linear", "cosine", "wsd", "step"] = "constant"
    """constant; linear or cosine decay (Loshchilov and Hutter, 2017) to the end of the run;
    wsd: warm-up, stable, decay (Hu et al., 2024), which decays linearly over the last
    ``decay_steps``; step: multiplied by ``gamma`` every ``step_size`` steps. All have a warm-up."""

    warmup_steps: int = Field(0, ge=0)
    """Steps over which the factor rises linearly from 1/warmup_steps to 1."""

    final_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """linear, cosine, wsd: the factor at the last step of the run."""

    decay_steps: int | None = Field(None, ge=1)
    """wsd: steps of the final decay; null for a tenth of the run."""

    step_size: int | None = Field(None, ge=1)
    """step: steps between two multiplications by ``gamma``; required for ``step``."""

    gamma: float = Field(0.1, gt=0.0, le=1.0)
    """step: the multiplier."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.use == "step" and self.step_size is None:
            raise ValueError(
                "schedule.use=step needs schedule.step_size; set it to a number of steps"
            )
        return self


def learning_rate_factor(config: ScheduleConfig, total_steps: int) -> Callable[[int], float]:
    """The factor on the base learning rate as a function of the step, counted from 0."""
    warmup = config.warmup_steps
    decay_steps = config.decay_steps or max(1, total_steps // 10)

    def progress(step: int, start: int) -> float:
        """0 at ``start``, 1 at the last step of the run."""
        return min(1.0, (step - start) / max(1, total_steps - 1 - start))

    def between(weight: float) -> float:
        return config.final_ratio + (1.0 - config.final_ratio) * weight

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.use == "linear":
            return between(1.0 - progress(step, warmup))
        if config.use == "cosine":
            return between(0.5 * (1.0 + math.cos(math.pi * progress(step, warmup))))
        if config.use == "wsd":
            start = max(warmup, total_steps - decay_steps)
            return between(1.0 - progress(step, start)) if step >= start else 1.0
        if config.use == "step":
            assert config.step_size is not None
            return float(config.gamma ** ((step - warmup) // config.step_size))
        return 1.0

    return factor
