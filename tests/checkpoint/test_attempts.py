"""attempts.jsonl: numbers, and the end of each attempt."""

import json
import os

import pytest

from train.checkpoint.attempts import Attempts
from train.files import TooLargeError


@pytest.fixture
def attempts(tmp_path):
    made = Attempts(tmp_path / "attempts.jsonl")
    for number in (1, 2):
        made.record({"attempt": number, "host": "node-0"})
    return made


def test_an_end_is_added_to_the_line_of_its_attempt(attempts):
    attempts.record_end(1, 75, "the disk is full")
    first, second = attempts.by_number().values()
    assert first["host"] == "node-0"
    assert (first["ended"]["code"], first["ended"]["reason"]) == (75, "the disk is full")
    assert first["ended"]["time"] > 1.7e9
    assert "ended" not in second
    assert attempts.count() == 2


def test_the_numbers_of_attempts_stay_after_an_end(attempts):
    """Earlier versions count the lines."""
    attempts.record_end(2, 0, "finished")
    attempts.record({"attempt": 3})
    lines = attempts.path.read_text().splitlines()
    assert [json.loads(line)["attempt"] for line in lines] == [1, 2, 3]


def test_damaged_lines_are_kept(attempts):
    with attempts.path.open("ab") as file:
        file.write(b'\xff garbage\n{"attempt": 4}\n')
    attempts.record_end(4, 143, "stopped")
    attempts.record_end(3, 143, "stopped")
    lines = attempts.path.read_bytes().splitlines()
    assert lines[2] == b"\xff garbage"
    assert json.loads(lines[3])["ended"]["code"] == 143
    assert list(attempts.by_number()) == [1, 2, 4]


@pytest.mark.parametrize("number", [3, 99])
def test_an_attempt_that_is_not_recorded_gets_no_end(attempts, number):
    before = attempts.path.read_bytes()
    attempts.record_end(number, 0, "finished")
    assert attempts.path.read_bytes() == before


def test_an_end_that_cannot_be_written_leaves_the_file(attempts, monkeypatch):
    def no_space(_path, _data):
        raise OSError(28, "No space left on device")

    before = attempts.path.read_bytes()
    monkeypatch.setattr("train.checkpoint.attempts.replace_bytes", no_space)
    with pytest.raises(OSError, match="No space"):
        attempts.record_end(1, 0, "finished")
    assert attempts.path.read_bytes() == before


def test_a_file_that_is_too_large_is_not_read(attempts):
    os.truncate(attempts.path, 100 << 30)  # sparse
    for call in (attempts.count, attempts.by_number):
        with pytest.raises(TooLargeError):
            call()
    assert attempts.last() == {}
