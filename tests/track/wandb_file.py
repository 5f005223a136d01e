"""Reads the .wandb file that an offline run leaves behind.

The file is a LevelDB log behind a header of 7 bytes (":W&B", a magic number, a version): blocks of
32 KiB that hold fragments, each with a header of CRC-32 (4 bytes; zlib's, where LevelDB has a
masked CRC-32C), length (2) and type (1: whole, 2: first, 3: middle, 4: last), little-endian. The
fragments joined are protobuf messages.
"""

import json
import struct
import zlib
from contextlib import suppress
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32 * 1024, struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path, *, growing=False):
    """The records of a .wandb file, in order; checks its header and every checksum.

    A file that is still written to (`growing`) may end within a record, which is left out.
    """
    data = Path(path).read_bytes()
    assert struct.unpack("<4sHB", data[:7])[:2] == (b":W&B", 0xBEE1)
    found, joined, at = [], b"", 7
    while at + _HEADER.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:  # padding at the end of a block
            at += left
            continue
        checksum, length, kind = _HEADER.unpack_from(data, at)
        start = at + _HEADER.size
        part = data[start : start + length]
        if growing and len(part) < length:
            break
        assert len(part) == length, "the file ends within a record"
        assert checksum == zlib.crc32(bytes([kind]) + part)
        joined = part if kind in (_WHOLE, _FIRST) else joined + part
        if kind in (_WHOLE, _LAST):
            record = Record()
            record.ParseFromString(joined)
            found.append(record)
        at = start + length
    return found


def history(records):
    """The rows as logged, as dicts."""
    return [_values(record.history.item) for record in records if record.HasField("history")]


class WandbFile:
    """The content of an offline run."""

    def __init__(self, path):
        self.records = records(path)
        (self.run,) = (r.run for r in self.records if r.HasField("run"))
        self.config = _values(self.run.config.update)
        self.metrics = {}
        """Definitions by name (or glob) of the metric."""
        self.history = history(self.records)
        """Rows as logged."""
        self.summary = {}
        for record in self.records:
            if record.HasField("metric"):
                metric = record.metric
                self.metrics[metric.name or metric.glob_name] = metric
            elif record.HasField("summary"):
                self.summary |= _values(record.summary.update)
        self.exit_code = [r.exit.exit_code for r in self.records if r.HasField("exit")]


def _values(items):
    """Items as a dict; an item's key is a name, or the path to a value within dicts."""
    values = {}
    for item in items:
        *path, name = [item.key] if item.key else item.nested_key
        inner = values
        for part in path:
            inner = inner.setdefault(part, {})
        inner[name] = json.loads(item.value_json)
    return values


def offline_files(directory):
    """The .wandb files of a run directory, in order of start."""
    return sorted(Path(directory).glob("wandb/offline-run-*/*.wandb"))


def service(pid):
    """The process that wandb has started for this process id; None if it has ended."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"wandb-core") and str(pid).encode() in words:
                return int(path.parent.name)
    return None
