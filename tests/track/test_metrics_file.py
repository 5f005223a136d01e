import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.support.runs import ROOT
from train.files import TooLargeError
from train.track.metrics_file import MetricsFile


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path):
    return [row["step"] for row in rows(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, *wanted, start_step=0, attempt=1):
    file = MetricsFile(path, start_step=start_step, attempt=attempt)
    for step in wanted:
        file.log(step, {"train/loss": float(step)})
    file.close()


def test_metrics_of_one_step_are_one_row(path):
    file = MetricsFile(path, start_step=0, attempt=3)
    file.log(1, {"train/loss": 2.5, "train/skipped_steps": 0.0})
    file.log(1, {"eval/loss": 2.25})
    file.log(2, {"train/loss": math.nan, "train/gradient_norm": math.inf})
    file.close()
    first, second = rows(path)
    assert first.pop("time") == pytest.approx(second.pop("time"), abs=60)
    assert first == {
        "step": 1, "attempt": 3, "train/loss": 2.5, "train/skipped_steps": 0.0, "eval/loss": 2.25,
    }  # fmt: skip
    assert second["train/loss"] is None
    assert second["train/gradient_norm"] is None
    assert "NaN" not in path.read_text(), "NaN must not be written, as it is not valid JSON"


def test_a_row_is_written_when_the_next_step_is_done(path):
    file = MetricsFile(path, start_step=0, attempt=1)
    file.log(1, {"train/loss": 1.0})
    file.advance(1)
    assert steps(path) == []
    file.advance(2)
    assert steps(path) == [1]


def test_flush_writes_the_rows_of_the_checkpoint_and_no_later_one(path):
    """Flush is called in another thread, while training may be steps ahead."""
    file = MetricsFile(path, start_step=0, attempt=1)
    file.log(1, {"train/loss": 1.0})
    file.flush(1)
    assert steps(path) == [1]
    file.log(2, {"train/loss": 1.0})
    file.flush(1)
    assert steps(path) == [1]


def test_rows_are_complete_and_in_order_with_concurrent_flushes(path):
    file = MetricsFile(path, start_step=0, attempt=1)
    stop = threading.Event()
    reached = [0]

    def checkpoints():
        while not stop.is_set():
            file.flush(reached[0] - 1)

    thread = threading.Thread(target=checkpoints)
    thread.start()
    try:
        for step in range(1, 3001):
            file.advance(step)
            file.log(step, {"train/loss": 1.0})
            file.log(step, {"eval/loss": 2.0})
            reached[0] = step
    finally:
        stop.set()
        thread.join()
    file.close()
    written = rows(path)
    assert [row["step"] for row in written] == list(range(1, 3001))
    assert all(row["train/loss"] == 1.0 and row["eval/loss"] == 2.0 for row in written)


def test_flush_syncs(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    file = MetricsFile(path, start_step=0, attempt=1)
    file.log(1, {"train/loss": 1.0})
    file.flush(1)
    assert synced == [path.stat().st_size] != [0]


def test_a_resume_removes_rows_of_later_steps(path):
    write(path, 1, 2, 3, 4)
    write(path, 3, 4, 5, start_step=2, attempt=2)
    assert [(row["step"], row["attempt"]) for row in rows(path)] == [
        (1, 1), (2, 1), (3, 2), (4, 2), (5, 2),
    ]  # fmt: skip


def test_a_start_from_the_beginning_removes_all_rows(path):
    write(path, 1, 2)
    write(path, start_step=0, attempt=2)
    assert rows(path) == []


def test_an_incomplete_last_line_is_removed(path):
    write(path, 1, 2)
    with path.open("a") as file:
        file.write('{"step": 3, "att')
    file = MetricsFile(path, start_step=5, attempt=2)
    assert file.damaged == 0, "an incomplete line must not count as damage"
    file.log(3, {"train/loss": 3.0})
    file.close()
    assert steps(path) == [1, 2, 3]


def test_a_last_row_that_only_lacks_its_line_end_is_kept(path):
    write(path, 1, 2)
    path.write_bytes(path.read_bytes().rstrip())
    write(path, 3, start_step=2)
    assert steps(path) == [1, 2, 3]


def test_lines_that_are_not_rows_are_moved(path):
    write(path, 1)
    bad = ["garbage", "[1]", '"text"', "{}", "", '{"step": "x"}']
    with path.open("a") as file:
        file.write("\n".join(bad) + "\n\0\0\n")
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n" + json.dumps({"step": 2}).encode() + b"\n")
    file = MetricsFile(path, start_step=9, attempt=2)
    assert file.damaged == len(bad) + 2
    assert steps(path) == [1, 2]
    moved = path.with_name("metrics.jsonl.damaged").read_bytes()
    assert moved == ("\n".join(bad) + "\n\0\0\n").encode() + b"\xff\xfe\n"


@pytest.mark.parametrize("start_step", [0, 4])
def test_an_evaluation_of_the_next_attempt_is_merged_into_its_row(path, start_step):
    """The evaluation was interrupted by a stop, or the attempt died before its first checkpoint, so
    that the evaluation before the first step is repeated."""
    write(path, start_step)
    file = MetricsFile(path, start_step=start_step, attempt=2)
    file.log(start_step, {"eval/loss": 0.5})
    assert steps(path) == [start_step], "the old row must be kept until the new one is written"
    file.log(start_step + 1, {"train/loss": 1.0})
    file.close()
    first, second = rows(path)
    assert first["train/loss"] == float(start_step)
    assert first["eval/loss"] == 0.5
    assert (second["step"], second["attempt"]) == (start_step + 1, 2)


def test_metrics_after_a_flush_are_merged_into_the_row(path):
    file = MetricsFile(path, start_step=0, attempt=1)
    for step in (1, 2):
        file.log(step, {"train/loss": 1.0})
    file.flush(2)
    file.log(2, {"eval/loss": 0.5})
    file.close()
    assert steps(path) == [1, 2]
    assert rows(path)[1].keys() == {"step", "attempt", "time", "train/loss", "eval/loss"}


def test_truncation_is_atomic(path, monkeypatch):
    write(path, 1, 2, 3)
    before = path.read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        MetricsFile(path, start_step=1, attempt=2)
    assert path.read_bytes() == before


class FullDisk:
    """A file that accepts some bytes and then raises ENOSPC."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        part = data[: self.room]
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(part)
        return self.file.write(part)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_rows_are_kept_until_the_disk_has_space(path, monkeypatch):
    disk = FullDisk(path.open("ab", buffering=0), 100)
    with monkeypatch.context() as patch:
        patch.setattr("train.track.metrics_file._opened", lambda path: disk)
        file = MetricsFile(path, start_step=0, attempt=1)
    file.log(1, {"train/loss": 1.0})
    file.advance(2)
    file.log(2, {"train/loss": 1.0})
    for step in (3, 4):
        with pytest.raises(OSError, match="No space"):
            file.log(step, {"train/loss": 1.0})
    assert steps(path) == [1]
    disk.room = 10_000
    file.advance(5)
    assert steps(path) == [1, 2, 3, 4]


def test_kill_9_loses_no_flushed_row(path):
    code = f"""
from pathlib import Path
from train.track.metrics_file import MetricsFile
file = MetricsFile(Path({str(path)!r}), start_step=0, attempt=1)
file.log(1, {{"a": 1.0}})
file.log(2, {{"a": 1.0}})
file.flush(2)
file.log(3, {{"a": 1.0}})
import os; os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps(path) == [1, 2]


def test_a_file_with_too_much_that_is_no_row_is_refused(path, monkeypatch):
    monkeypatch.setattr("train.json_files.LIMIT", 100)
    monkeypatch.setattr("train.track.metrics_file.LIMIT", 100)
    write(path, 1, 2)
    before = path.read_bytes() + b"\0" * 1000
    path.write_bytes(before)
    with pytest.raises(TooLargeError, match="more than 100 bytes of it are not rows"):
        MetricsFile(path, start_step=2, attempt=2)
    assert path.read_bytes() == before
