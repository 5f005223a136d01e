"""Learning-rate schedules: pure functions of the step, without state."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator, model_validator

from train.exits import RunError, UsageError, first_line, prefixed
from train.imports import import_function
from train.section import Section, name_or_path, names_for_editors

NAMES = ("constant", "linear", "cosine", "cosine_restarts", "wsd", "step")


class ScheduleConfig(Section):
    """The learning rate over the run, as a factor on ``optim.lr``."""

    use: str = Field("constant", json_schema_extra=names_for_editors(NAMES))
    """constant; linear or cosine decay (Loshchilov and Hutter, 2017) to the end of the run;
    cosine_restarts: cosine decay over ``restart_steps``, again and again from 1 (same source);
    wsd: warm-up, stable, decay (Hu et al., 2024), which decays linearly over the last
    ``decay_steps``; step: multiplied by ``gamma`` every ``step_size`` steps; or the dotted path of
    a function of (step, total_steps), or of a class whose instances are. All have a warm-up."""

    warmup_steps: int = Field(0, ge=0)
    """Steps over which the factor rises linearly from 1/warmup_steps to 1."""

    final_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """linear, cosine, wsd: the factor at the last step of the run; cosine_restarts: at the last
    step of each period."""

    decay_steps: int | None = Field(None, ge=1)
    """wsd: steps of the final decay; null for a tenth of the run."""

    step_size: int | None = Field(None, ge=1)
    """step: steps between two multiplications by ``gamma``; required for ``step``."""

    gamma: float = Field(0.1, gt=0.0, le=1.0)
    """step: the multiplier."""

    restart_steps: int | None = Field(None, ge=1)
    """cosine_restarts: steps of the first period; required for ``cosine_restarts``."""

    restart_growth: float = Field(1.0, ge=1.0)
    """cosine_restarts: length of each period, as a multiple of the one before."""

    options: dict[str, Any] = {}
    """Keyword arguments of a function or class of your own."""

    @field_validator("use")
    @classmethod
    def _check_use(cls, use: str) -> str:
        return name_or_path(use, NAMES, "module.path:function")

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.use == "step" and self.step_size is None:
            raise ValueError(
                "schedule.use=step needs schedule.step_size; set it to a number of steps"
            )
        if self.use == "cosine_restarts" and self.restart_steps is None:
            raise ValueError(
                "schedule.use=cosine_restarts needs schedule.restart_steps; set it to a number "
                "of steps"
            )
        if self.use in NAMES and self.options:
            raise ValueError(
                f"schedule.options is {self.options!r}, but schedule.use={self.use} takes none; "
                "remove it"
            )
        return self


def depends_on_length(use: str) -> bool:
    """Whether the factor at a step may be another one in a longer run."""
    return use not in ("constant", "cosine_restarts", "step")


def learning_rate_factor(
    config: ScheduleConfig, total_steps: int, origin: str = "default"
) -> Callable[[int], float]:
    """The factor on the base learning rate as a function of the step, counted from 0.

    ``origin``: where schedule.use was set, for error messages. Raises UsageError for a schedule of
    the user's that does not work.
    """
    warmup = config.warmup_steps
    if config.use in NAMES:
        after_warmup = _built_in_factor(config, total_steps)
    else:
        after_warmup = _own_factor(config, total_steps, origin)

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else after_warmup(step)

    return factor


def _built_in_factor(config: ScheduleConfig, total_steps: int) -> Callable[[int], float]:
    warmup = config.warmup_steps
    decay_steps = config.decay_steps or max(1, total_steps // 10)

    def progress(step: int, start: int) -> float:
        """0 at ``start``, 1 at the last step of the run."""
        return min(1.0, (step - start) / max(1, total_steps - 1 - start))

    def between(weight: float) -> float:
        return config.final_ratio + (1.0 - config.final_ratio) * weight

    def factor(step: int) -> float:
        if config.use == "linear":
            return between(1.0 - progress(step, warmup))
        if config.use == "cosine":
            return between(0.5 * (1.0 + math.cos(math.pi * progress(step, warmup))))
        if config.use == "cosine_restarts":
            step_in_period, length = _in_period(config, step - warmup)
            part = step_in_period / max(1, length - 1)
            return between(0.5 * (1.0 + math.cos(math.pi * part)))
        if config.use == "wsd":
            start = max(warmup, total_steps - decay_steps)
            return between(1.0 - progress(step, start)) if step >= start else 1.0
        if config.use == "step":
            assert config.step_size is not None
            return float(config.gamma ** ((step - warmup) // config.step_size))
        return 1.0

    return factor


def _in_period(config: ScheduleConfig, step: int) -> tuple[int, int]:
    """The step counted from the start of its period, and the length of this period."""
    assert config.restart_steps is not None
    length = float(config.restart_steps)
    if config.restart_growth == 1.0:
        return step % config.restart_steps, config.restart_steps
    start = 0
    while step >= start + round(length):
        start += round(length)
        length *= config.restart_growth
    return step - start, round(length)


def _own_factor(config: ScheduleConfig, total_steps: int, origin: str) -> Callable[[int], float]:
    """A schedule that ``use`` names by dotted path, tried at both ends of the run."""
    field = f"schedule.use={config.use} ({origin})"
    found = import_function(config.use, f"schedule.use ({origin})")
    is_class = isinstance(found, type)
    arguments = () if is_class else (0, total_steps)
    try:
        inspect.signature(found).bind(*arguments, **config.options)
        schedule = found(**config.options) if is_class else found
    except RunError as error:
        raise prefixed(field, error) from error
    except Exception as error:
        raise UsageError(
            f"{field} does not accept schedule.options={config.options!r} "
            f"({type(error).__name__}: {first_line(error)}); correct one of them."
        ) from error
    options = {} if is_class else config.options

    def factor(step: int) -> float:
        try:
            value = float(schedule(step, total_steps, **options))
        except RunError as error:
            raise prefixed(f"{field} at step {step}", error) from error
        except Exception as error:
            raise UsageError(
                f"{field} failed at step {step} of {total_steps} ({type(error).__name__}: "
                f"{first_line(error)}); it must return a number for (step, total_steps)."
            ) from error
        if not (math.isfinite(value) and value >= 0.0):
            raise UsageError(
                f"{field} returned {value} at step {step} of {total_steps}; return a finite "
                "factor of at least 0."
            )
        return value

    first, last = factor(0), factor(total_steps - 1)
    if (factor(0), factor(total_steps - 1)) != (first, last):
        raise UsageError(
            f"{field} returns another factor when it is called again for the same step; compute "
            "it from (step, total_steps) alone, since a resumed run starts in the middle."
        )
    return factor
