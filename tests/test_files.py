"""Durable file writes: a failure leaves either all of the new content or all of the old."""

import json
import os
import socket
from io import FileIO

import pytest

from train.files import (
    NotRegularError,
    TooLargeError,
    append_bytes,
    is_plain_name,
    open_regular,
    read_bytes,
    refuse_irregular,
    refuse_link,
    replace_bytes,
    write_json,
)
from train.json_files import json_lines, parse_object, read_object, shown


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


@pytest.mark.parametrize(
    "name",
    ["a", "__0_0.distcp", ".metadata", "-x", "é", "a b", "..a", "run.json.00000-ff", "x" * 255],
)
def test_a_plain_name(name):
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "/", "/a", "a/", "a/b", "../a", "a\\b", "a\0", "a\n", "\x1b[2J", "\ud800",
        "\u202e", "x" * 256, "é" * 128, None, 3, b"a", ["a"],
    ],
)  # fmt: skip
def test_a_name_that_is_no_single_harmless_component(name):
    assert not is_plain_name(name)


def link(path):
    target = path.with_name("target")
    target.write_text("of others")
    path.symlink_to(target)


def dangling(path):
    path.symlink_to(path.with_name("nowhere"))


def listening(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


KINDS = [
    (link, "a symbolic link"),
    (dangling, "a symbolic link"),
    (os.mkfifo, "a FIFO"),
    (listening, "a socket"),
    (lambda path: path.symlink_to("/dev/zero"), "a symbolic link"),
]
FLAGS = [
    os.O_RDONLY,
    os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    os.O_RDWR | os.O_CREAT,
]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_only_regular_files_are_opened(tmp_path, make, kind, flags):
    path = tmp_path / "file"
    make(path)
    with pytest.raises(NotRegularError, match=f"it is {kind}") as caught:
        open_regular(path, flags)
    assert caught.value.filename == str(path)
    with pytest.raises(NotRegularError, match=f"it is {kind}"):
        refuse_irregular(path)
    if make is link:
        assert (tmp_path / "target").read_text() == "of others"
    assert not (tmp_path / "nowhere").exists()


def test_a_device_is_not_opened():
    with pytest.raises(NotRegularError, match="a device"):
        open_regular("/dev/zero")


@pytest.mark.parametrize("flags", FLAGS)
def test_a_directory_is_no_regular_file(tmp_path, flags):
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path, flags)


@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_a_replacement_writes_through_no_temporary_name(tmp_path, make, kind):
    make(tmp_path / ".config.json.new")
    write_json(tmp_path / "config.json", {"a": 1})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    assert not (tmp_path / "config.json").is_symlink()
    assert not (tmp_path / "nowhere").exists()
    if make is link:
        assert (tmp_path / "target").read_text() == "of others"


def test_a_replaced_link_is_not_followed(tmp_path):
    link(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {})
    assert (tmp_path / "target").read_text() == "of others"


def test_a_directory_above_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_json(tmp_path / "link/file", {"a": 1})
    assert read_object(tmp_path / "link/file") == {"a": 1}
    refuse_link(tmp_path / "real")
    with pytest.raises(NotRegularError):
        refuse_link(tmp_path / "link")


def test_a_size_is_checked_before_the_file_is_read(tmp_path):
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 5 << 30)  # a sparse file
    with pytest.raises(TooLargeError, match="it has 5,368,709,120 bytes, more than the 100"):
        read_bytes(path, 100)
    os.truncate(path, 100)
    assert read_bytes(path, 100) == bytes(100)


def test_a_file_larger_than_the_memory_is_named(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 1 << 43)
    with pytest.raises(TooLargeError, match="its 8,796,093,022,208 bytes do not fit into memory"):
        read_bytes(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[]", "not a JSON object"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("{}", "it has no step"),
        ('{"step": "1"}', "its step is '1'"),
        ('{"step": true}', "its step is True"),
        ('{"step": 1.0}', "its step is 1.0"),
        ('{"step": {"x": 1}}', "its step is an object"),
        ('{"step": 1, "name": "\\ud800"}', "surrogates"),
        ("9" * 10_000, "limit"),
    ],
)
def test_json_of_another_form_is_refused_in_a_phrase(text, said):
    with pytest.raises(ValueError, match=said):
        parse_object(text, {"step": int})


def test_an_emoji_is_no_surrogate():
    assert parse_object('{"name": "\\ud83d\\ude00"}') == {"name": "😀"}


def test_lines_without_an_object_are_kept_apart(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n[]\n\xff\n' + b"[" * 50_000 + b'\n{"a": 2')
    assert [row for _, row in json_lines(path)] == [{"a": 1}, None, None, None, None]


@pytest.mark.parametrize("value", ["x" * 1000, [[1]], {"a": 1}, 10**1000, 1.5, None])
def test_a_shown_value_is_short(value):
    assert len(shown(value)) <= 60
