"""The end of metrics.jsonl has the newest values, and the best within a bound."""

import json
import math

from train.runs.tail import read_tail


def write(path, rows, rest=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)
    return path


def rows(count):
    """The evaluation is best at step 30, and again at step 60."""
    for step in range(1, count + 1):
        row = {"step": step, "train/loss": 1 / step}
        if step % 10 == 0:
            row["eval/loss"] = 1.0 + min(abs(step - 30), abs(step - 60)) / 10
        yield row


def test_the_newest_and_the_best_values(tmp_path):
    found = read_tail(write(tmp_path / "m", rows(95)), "eval/loss", "min")
    assert found.row["step"] == 95
    assert (found.newest["eval/loss"].step, found.newest["train/loss"].step) == (90, 95)
    assert (found.best.value, found.best.step, found.complete) == (1.0, 30, True)


def test_the_largest_is_best_where_the_mode_is_max(tmp_path):
    found = read_tail(write(tmp_path / "m", rows(95)), "eval/loss", "max")
    assert (found.best.value, found.best.step) == (4.0, 90)


def test_a_row_that_is_still_being_written_does_not_count(tmp_path):
    found = read_tail(write(tmp_path / "m", rows(20), '{"step": 21, "tr'), "eval/loss", "min")
    assert found.row["step"] == 20


def test_only_the_end_of_a_large_file_is_read(tmp_path):
    found = read_tail(write(tmp_path / "m", rows(95)), "eval/loss", "min", limit=2000)
    assert not found.complete
    assert found.best.step == 60


def test_values_that_are_not_finite_are_newest_but_never_best(tmp_path):
    lines = [{"step": 1, "eval/loss": 2.0}, {"step": 2, "eval/loss": None}]
    found = read_tail(
        write(tmp_path / "m", lines, '{"step": 3, "eval/loss": NaN}\n'), "eval/loss", "min"
    )
    assert math.isnan(found.newest["eval/loss"].value)
    assert found.newest["eval/loss"].step == 3
    assert (found.best.value, found.best.step) == (2.0, 1)


def test_damaged_lines_are_skipped(tmp_path):
    damage = '[1]\n{"step": -1}\n{"step": "x"}\n\xff\n{"step": 2, "eval/loss": "low"}\n'
    found = read_tail(write(tmp_path / "m", rows(1), damage), "eval/loss", "min")
    assert found.row["step"] == 2
    assert found.best is None


def test_no_file_has_no_values(tmp_path):
    assert read_tail(tmp_path / "none", "eval/loss", "min").row is None
