"""The steps at which a run logs, evaluates and saves."""

from __future__ import annotations

from typing import Any

import pytest

from train.checkpoint.checkpoint_config import CheckpointConfig
from train.config.schema import EvaluateConfig
from train.loop.triggers import Triggers
from train.track.track_config import TrackConfig


def triggers(
    *,
    track: dict[str, Any] | None = None,
    evaluate: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    total_steps: int = 60,
    batch_size: int = 8,
    dataset_size: int = 100,
) -> Triggers:
    return Triggers(
        track=TrackConfig(**(track or {})),
        evaluate=EvaluateConfig(**{"at_end": False, **(evaluate or {})}),
        checkpoint=CheckpointConfig(**(checkpoint or {})),
        total_steps=total_steps,
        batch_size=batch_size,
        dataset_size=dataset_size,
    )


def steps(rule: Any, total: int = 60) -> list[int]:
    return [step for step in range(1, total + 1) if rule(step)]


def evaluated(made: Triggers, total: int = 60) -> list[int]:
    return steps(lambda step: made.evaluate(step, 8 * step), total)


def test_epochs_are_exact_decimal_fractions() -> None:
    # 100 samples, 8 a step: 8 times 0.55 epochs are 440 samples, the end of step 55 (in floats:
    # 56).
    found = evaluated(triggers(evaluate={"every_epochs": 0.55}))
    assert found == [7, 14, 21, 28, 35, 42, 49, 55]


def test_a_period_shorter_than_a_step_is_due_at_each_step() -> None:
    assert evaluated(triggers(evaluate={"every_epochs": 0.01}), 5) == [1, 2, 3, 4, 5]


def test_evaluation_by_steps_by_epochs_and_at_the_end_are_combined() -> None:
    rules = {"every_steps": 20, "every_epochs": 2.0, "at_end": True}
    found = evaluated(triggers(evaluate=rules, total_steps=59), 59)
    assert found == [20, 25, 40, 50, 59]


def test_nothing_is_evaluated_without_a_rule() -> None:
    assert evaluated(triggers()) == []


def test_logs_at_the_first_and_the_last_step_too() -> None:
    assert steps(triggers(track={"log_every_steps": 25}).log) == [1, 25, 50, 60]


def test_histograms_have_a_rule_of_their_own() -> None:
    assert steps(triggers().histograms) == []
    assert steps(triggers(track={"histograms_every_steps": 30}).histograms) == [30, 60]


def test_the_last_step_is_left_to_the_end_of_the_run_to_save() -> None:
    assert steps(triggers(checkpoint={"every_steps": 20}).save) == [20, 40]


def test_checkpoints_by_minutes_count_from_the_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    rules = triggers(checkpoint={"every_minutes": 2.0})
    now += 119
    assert not rules.time_to_save()
    now += 1
    assert rules.time_to_save()
    rules.checkpoint_started()
    assert not rules.time_to_save()
    now += 120
    assert rules.time_to_save()


def test_time_is_not_used_without_a_rule_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = triggers(checkpoint={"every_minutes": None})
    monkeypatch.setattr("time.monotonic", lambda: float("inf"))
    assert not rules.time_to_save()
