"""JSON for other programs, in which no number is NaN or infinite."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from train.checkpoint.run_directory import RunDirectory
from train.commands import evaluate
from train.json_text import finite, json_text

NAN, INFINITE = float("nan"), float("inf")


def strict(text):
    """The value of JSON text, as a program reads it that knows no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"it has {name}"))


def test_numbers_that_are_not_finite_are_null_at_any_depth():
    value = {
        "a": NAN,
        "b": [1.5, -INFINITE, {"c": (INFINITE, 2)}],
        "d": "NaN",
        "e": None,
        "f": True,
    }
    expected = {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": None, "f": True}
    assert strict(json_text(value)) == strict(json_text(value, indent=1)) == expected
    assert finite(expected) == expected


def test_finished_json_is_json_also_after_an_evaluation_that_is_not_finite(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.acquire()
    run.mark_finished({"step": 5, "metrics": {"loss": NAN, "accuracy": 0.5}})
    run.release()
    assert strict(run.finished_path.read_text())["metrics"] == {"loss": None, "accuracy": 0.5}
    metrics = run.finished()["metrics"]
    assert math.isnan(metrics["loss"]), "a metric is a number for Python"
    assert metrics["accuracy"] == 0.5


def test_evaluate_prints_json_also_of_a_loss_that_is_not_finite(monkeypatch, capsys):
    found = evaluate.Evaluated("step-5", 8, {"loss": INFINITE, "accuracy": 0.5}, is_main=True)
    monkeypatch.setattr(evaluate, "local_checkpoint", lambda _: nullcontext((None, "last", None)))
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", lambda *_, **__: found)
    evaluate.run(SimpleNamespace(json=True, other_data=False))
    printed = strict(capsys.readouterr().out)
    assert printed == {"checkpoint": "step-5", "loss": None, "accuracy": 0.5}
