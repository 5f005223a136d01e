"""Reads the .wandb file that an offline run leaves behind."""

import json
import struct
from contextlib import suppress
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

from train.track.wandb_log import messages


def records(path, *, growing=False):
    """The records of a .wandb file, in order; checks its header and every checksum.

    A file that is still written to (`growing`) may end within a record, which is left out.
    """
    data = Path(path).read_bytes()
    assert struct.unpack("<4sHB", data[:7])[:2] == (b":W&B", 0xBEE1)
    found = []
    for message in messages(data, growing=growing):
        record = Record()
        record.ParseFromString(message)
        found.append(record)
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
