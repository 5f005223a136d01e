"""Curves of any length in bounded memory."""

import json
import math

import pytest

from train.report.curves import BUCKETS, CURVES, Curve, Point, read_metrics


def curve_of(values, every=1):
    curve = Curve()
    for number, value in enumerate(values):
        curve.add(Point(number * every, float(number), value))
    return curve


@pytest.mark.parametrize("every", [1, 7, 10, 1000])
def test_a_curve_of_as_many_points_as_are_drawn_is_exact(every):
    values = [math.sin(number) for number in range(BUCKETS)]
    points = curve_of(values, every).points()
    assert [point.value for point in points] == values
    assert [point.step for point in points] == [number * every for number in range(BUCKETS)]


def test_a_long_curve_keeps_its_extremes_and_its_order():
    values = [math.sin(number / 5000) for number in range(60_000)]
    values[31_234], values[45_678] = 99.0, -99.0
    curve = curve_of(values)
    points = curve.points()
    assert len(points) <= 2 * BUCKETS
    assert [point.step for point in points] == sorted({point.step for point in points})
    kept = {point.step: point.value for point in points}
    assert kept[31_234] == 99.0
    assert kept[45_678] == -99.0
    assert all(values[step] == value for step, value in kept.items()), "a value is made up"
    assert (curve.count, curve.high.step, curve.low.step) == (60_000, 31_234, 45_678)
    assert (curve.first.value, curve.last.value) == (values[0], values[-1])


def test_a_value_that_is_not_finite_is_a_gap_in_a_long_curve_as_well():
    values = [1.0] * 30_000
    values[17_001] = None
    curve = curve_of(values)
    assert [p.step for p in curve.points() if p.value is None] == [17_001]
    assert curve.not_finite == 1


def test_rows_of_a_stranger_are_counted_or_left_out(tmp_path):
    rows = [
        b'{"step": 1, "time": 1e400, "a": 1}', b'{"step": 2, "attempt": "x", "a": "text", "b": 2}',
        b"no row", b'{"step": -1, "a": 5}', b'{"step": 1, "a": 5}', b'{"step": 3, "a": 1e999}',
        b'{"step": 4, "a": 7, "time": -5}',
        json.dumps({"step": 5, **{f"m{number}": 1 for number in range(500)}}).encode(),
        b'{"step": 6, "a": 8',
    ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(rows))
    found = read_metrics(path)
    assert found.rows == 5
    assert found.damaged == 3, "the last line is being written and does not count"
    assert len(found.curves) == CURVES
    assert found.left_out == 500 + 2 - CURVES
    a = found.curves["a"]
    assert [(p.step, p.value) for p in a.points()] == [(1, 1.0), (3, None), (4, 7.0)]
    assert all(point.time is None for point in a.points())


def test_skipped_steps_are_found_where_they_happened(tmp_path):
    totals = [(10, 0), (20, 2), (30, 2), (40, 3)]
    lines = [json.dumps({"step": s, "train/skipped_steps": n}) + "\n" for s, n in totals]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    skipped = read_metrics(tmp_path / "metrics.jsonl").skipped
    assert [(step, count, why) for step, _, count, why in skipped] == [
        (20, 2, "not finite"),
        (40, 1, "not finite"),
    ]


def test_spikes_are_told_from_steps_that_are_not_finite(tmp_path):
    rows = [(10, 0, 0), (20, 2, 2), (30, 5, 3), (40, 6, 3)]
    lines = [
        json.dumps({"step": step, "train/skipped_steps": skips, "train/spikes": spikes}) + "\n"
        for step, skips, spikes in rows
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    whys = [why for *_, why in read_metrics(tmp_path / "metrics.jsonl").skipped]
    assert whys == ["spikes", "not finite, or spikes", "not finite"]
