"""The ledger: which samples each committed step used, across all attempts.

A binary, append-only file of fixed-size records. STEP records are appended just before the commit
of the checkpoint that covers them. A START record opens each attempt and holds the step that it
resumes from, which voids all later steps before it. Each record ends in its CRC-32, so that a
record cut off by a crash differs from a damaged file.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.order import SampleOrder, mix
from train.exits import DataError
from train.files import append_bytes, fsync, open_regular, read_bytes

_MAGIC = b"isorun ledger 1\n"
# Little endian: kind, flags, attempt, step, position, then two words by kind, and the CRC-32.
_RECORD = struct.Struct("<HHIQQQQI")
_ROW = np.dtype(
    [
        ("kind", "<u2"),
        ("flags", "<u2"),
        ("attempt", "<u4"),
        *((name, "<u8") for name in ("step", "position", "first", "second")),
        ("crc", "<u4"),
    ]
)
_START, _STEP = 1, 2
_SHUFFLE = 1
_BLOCK = 1 << 18  # positions verified at once
_LARGEST_STEP = 1 << 30  # samples; larger than any real batch, small enough for memory


@dataclass(frozen=True)
class StepRecord:
    """The samples that one optimiser step used."""

    step: int
    """From 1."""
    start_position: int
    """Position of the first sample in the stream."""
    count: int
    """Number of samples."""
    digest: int
    """See ``step_digest``."""


@dataclass(frozen=True)
class AttemptStart:
    """The start of an attempt, which voids the steps after ``step`` before it."""

    attempt: int
    step: int
    """The step that it resumes from; 0 for none."""
    position: int
    """Samples used up to that step."""
    order: SampleOrder
    """The order of the steps of this attempt."""


@dataclass(frozen=True)
class History:
    """The content of a ledger."""

    steps: list[tuple[StepRecord, AttemptStart]]
    """The steps that are not void, each with the attempt that took it."""
    starts: list[AttemptStart]
    """All attempts, in the order of the file."""


@dataclass(frozen=True)
class LedgerReport:
    """The result of ``verify``: whether the ledger is valid, and one sentence on it."""

    ok: bool
    text: str

    def __str__(self) -> str:
        return self.text


def sample_digests(positions: NDArray[np.int64], indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A 64-bit hash, uint64, of each (position, sample index)."""
    hashed = mix(positions.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return mix(hashed ^ (indices.astype(np.uint64) + np.uint64(0xD1B54A32D192ED03)))


def step_digest(positions: NDArray[np.int64], indices: NDArray[np.int64]) -> int:
    """The sum modulo 2**64 of the hashes of all samples; digests of parts of a step add up."""
    return int(sample_digests(positions, indices).sum(dtype=np.uint64))


class Ledger:
    """The ledger of one run, open for appending, on rank 0 only.

    A record cut off at the end of the file is removed. Raises DataError for any other damage.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_step = 0
        """The last recorded step that is not void."""
        valid, exists = len(_MAGIC), path.exists()
        if exists:
            for end, item in _scan(path):
                valid = end
                self.last_step = item.step
        self._file = FileIO(open_regular(path, os.O_RDWR | os.O_CREAT), "r+b")
        self._file.write(_MAGIC)
        self._file.truncate(valid)
        if not exists:
            fsync(path.parent)

    def begin_attempt(
        self, *, attempt: int, resume_step: int, resume_position: int, order: SampleOrder
    ) -> None:
        """Records the start of an attempt, which voids all steps after ``resume_step``."""
        flags = _SHUFFLE if order.shuffle else 0
        self._append(
            [(_START, flags, attempt, resume_step, resume_position, order.seed, order.size)]
        )
        self.last_step = resume_step

    def append_steps(self, records: list[StepRecord]) -> None:
        """Appends the steps after ``last_step`` durably: all, or on an OSError none."""
        new = [r for r in records if r.step > self.last_step]
        self._append([(_STEP, 0, 0, r.step, r.start_position, r.count, r.digest) for r in new])
        if new:
            self.last_step = new[-1].step

    def _append(self, rows: list[tuple[int, ...]]) -> None:
        append_bytes(self._file, b"".join(_pack(row) for row in rows), durable=True)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _pack(row: tuple[int, ...]) -> bytes:
    body = _RECORD.pack(*row, 0)[:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def _scan(path: Path) -> Iterator[tuple[int, StepRecord | AttemptStart]]:
    """The records in file order, each with the offset of its end.

    Ignores an incomplete record at the end. Raises DataError if valid records follow an invalid
    one.
    """
    data = read_bytes(path)
    if _MAGIC.startswith(data):
        return  # empty, or cut off in the header
    if not data.startswith(_MAGIC):
        raise DataError(f"{path} is not a ledger of this version of isorun; restore the file.")
    offset = len(_MAGIC)
    while offset + _RECORD.size <= len(data):
        end = offset + _RECORD.size
        item = _unpack(data, offset)
        if item is None:
            # At any offset, since bytes may be lost as well as changed.
            if any(_valid(data, at) for at in range(offset + 1, len(data) - _RECORD.size + 1)):
                raise DataError(
                    f"{path} is damaged at byte {offset}: the record there does not match its "
                    "CRC-32, but later ones do; restore the file from a copy."
                )
            return
        yield end, item
        offset = end


def _unpack(data: bytes, at: int) -> StepRecord | AttemptStart | None:
    """The record at this offset; None where its kind or its CRC-32 is wrong."""
    raw = data[at : at + _RECORD.size]
    kind, flags, attempt, step, position, first, second, crc = _RECORD.unpack(raw)
    if zlib.crc32(raw[:-4]) != crc or kind not in (_START, _STEP):
        return None
    if kind == _STEP:
        return StepRecord(step, position, first, second)
    try:
        order = SampleOrder(first, second, bool(flags & _SHUFFLE))
    except ValueError:  # a number of samples that no data set has
        return None
    return AttemptStart(attempt, step, position, order)


def _valid(data: bytes, at: int) -> bool:
    """Whether a complete record starts at this offset; checks its kind first, for speed."""
    if data[at] not in (_START, _STEP) or data[at + 1] != 0:
        return False
    body = data[at : at + _RECORD.size - 4]
    return data[at + len(body) : at + _RECORD.size] == struct.pack("<I", zlib.crc32(body))


def read_steps(path: Path) -> list[StepRecord]:
    """The records of all steps that are not void, in order."""
    return [record for record, _ in read_history(path).steps]


def read_history(path: Path) -> History:
    """Reads the whole ledger. Raises DataError if it is damaged."""
    history, start = History([], []), None
    for _, item in _scan(path):
        if isinstance(item, AttemptStart):
            start = item
            history.starts.append(start)
            while history.steps and history.steps[-1][0].step > start.step:
                history.steps.pop()
        elif start is None:
            raise DataError(f"{path} starts with a step instead of an attempt; restore the file.")
        else:
            history.steps.append((item, start))
    return history


def attempt_starts(path: Path) -> dict[int, int]:
    """The step that each attempt resumed from, by number of the attempt; {} without a ledger.

    Does not notice damage.
    """
    rows = _rows(path)
    starts = rows[rows["kind"] == _START]
    return dict(zip(starts["attempt"].tolist(), starts["step"].tolist(), strict=True))


def _rows(path: Path) -> NDArray[np.void]:
    """All records, of ``_ROW``; none without a ledger."""
    data = read_bytes(path) if path.is_file() else b""
    if not data.startswith(_MAGIC):
        return np.empty(0, _ROW)
    return np.frombuffer(data, _ROW, (len(data) - len(_MAGIC)) // _RECORD.size, len(_MAGIC))


def recorded_step(path: Path, step: int) -> tuple[StepRecord, AttemptStart] | None:
    """The record of one step with the attempt that took it; None where the ledger has none.

    Reads only the records that are asked for, so it does not notice other damage.
    """
    rows = _rows(path)
    starts = np.flatnonzero(rows["kind"] == _START)
    voiding = starts[rows["step"][starts] < step]
    found = np.flatnonzero((rows["kind"] == _STEP) & (rows["step"] == step))
    found = found[found > (voiding[-1] if len(voiding) else len(rows))]
    if not len(found):
        return None
    at = starts[starts < found[0]][-1], found[0]
    start, record = (_unpack(rows[index].tobytes(), 0) for index in at)
    if not isinstance(start, AttemptStart) or not isinstance(record, StepRecord):
        return None  # damaged
    return record, start


def verify(path: Path, *, last_step: int | None = None, committed_step: int = 0) -> LedgerReport:
    """Checks that each position of the stream was used exactly once, or names the first fault.

    Steps must be numbered 1, 2, 3 ..., each must start where the previous one ended, and its
    samples must be those that the order (recomputed from the seed) has there. ``last_step``: the
    last step of a finished run, None for others. ``committed_step``: the newest checkpoint's step.
    """
    if not path.exists():
        return LedgerReport(False, f"{path} does not exist")
    try:
        history = read_history(path)
    except DataError as error:
        return LedgerReport(False, str(error))
    records = [(record, start.order) for record, start in history.steps]
    step = records[-1][0].step if records else 0
    fault = _first_break([record for record, _ in records]) or _first_wrong_digest(records)
    if fault is None and last_step is not None and step != last_step:
        fault = f"the run ended at step {last_step}, but the ledger ends at {step}"
    if fault is None and step < committed_step:
        fault = f"there is a checkpoint of step {committed_step}, but the ledger ends at {step}"
    if fault is not None:
        return LedgerReport(False, fault)
    if not records:
        return LedgerReport(True, "no step is committed yet")
    last = records[-1][0]
    return LedgerReport(
        True,
        f"{step} steps, positions 0 to {last.start_position + last.count - 1}, each used "
        f"exactly once, in {len(history.starts)} attempt(s)",
    )


def _first_break(records: list[StepRecord]) -> str | None:
    """The first step that is missing or repeated, or whose positions leave a gap or overlap."""
    position = 0
    for step, record in enumerate(records, start=1):
        start = record.start_position
        if record.step > step:
            return f"step {step} is missing: step {record.step} follows {step - 1}"
        if record.step < step:
            return f"step {record.step} is repeated: it follows step {step - 1}"
        if not 1 <= record.count <= _LARGEST_STEP:
            return f"step {step} cannot have used {record.count} samples"
        if start > position:
            return (
                f"positions {position} to {start - 1} were never used: step {step} starts "
                f"at {start}"
            )
        if start < position:
            return (
                f"positions {start} to {position - 1} were used twice: step {step} starts "
                f"at {start}"
            )
        position += record.count
    return None


def _first_wrong_digest(records: list[tuple[StepRecord, SampleOrder]]) -> str | None:
    """The first step whose samples are not those of the order, if any.

    Recomputes the digests of many steps at once. Positions must be contiguous.
    """
    begin = 0
    while begin < len(records):
        order, end, samples = records[begin][1], begin, 0
        while end < len(records) and records[end][1] is order and samples < _BLOCK:
            samples += records[end][0].count
            end += 1
        block = [record for record, _ in records[begin:end]]
        start = block[0].start_position
        positions = np.arange(start, start + samples, dtype=np.int64)
        digests = sample_digests(positions, order.keys(positions)[1])
        counts = np.array([record.count for record in block])
        starts = np.cumsum(counts) - counts
        sums = np.add.reduceat(digests, starts) if samples else digests
        expected = np.array([record.digest for record in block], dtype=np.uint64)
        for record, same in zip(block, sums == expected, strict=True):
            if not same:
                last = record.start_position + record.count - 1
                return (
                    f"step {record.step} did not use the samples that the seed has at positions "
                    f"{record.start_position} to {last}"
                )
        begin = end
    return None
