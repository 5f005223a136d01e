"""Durable file writes: a failure leaves either all of the new content or all of the old."""

import json
from io import FileIO

import pytest

from train.files import append_bytes, replace_bytes, write_json


class SmallDisk(FileIO):
    """Writes at most two bytes per call, and fails after ``room`` bytes."""

    room = 100

    def write(self, data):
        if self.room <= 0:
            raise OSError(28, "No space left on device")
        self.room -= len(data[:2])
        return super().write(data[:2])


@pytest.mark.parametrize("durable", [False, True])
def test_an_append_writes_everything(tmp_path, durable):
    path = tmp_path / "file"
    path.write_bytes(b"old,")
    with SmallDisk(path, "r+") as file:
        append_bytes(file, b"first,", durable=durable)
        append_bytes(file, b"second", durable=durable)
    assert path.read_bytes() == b"old,first,second"


def test_a_failed_append_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old,")
    with SmallDisk(path, "r+") as file:
        file.room = 3
        with pytest.raises(OSError, match="No space left"):
            append_bytes(file, b"does not fit", durable=True)
        file.room = 100
        append_bytes(file, b"fits", durable=True)
    assert path.read_bytes() == b"old,fits"


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_json(path, {"step": 1})

    def fails(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.files.fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        replace_bytes(path, b"new")
    assert json.loads(path.read_text()) == {"step": 1}
