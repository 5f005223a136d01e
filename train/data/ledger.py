"""The ledger: which samples each committed step used, across all attempts.

A binary, append-only file of fixed-size records. STEP records are appended just before the commit
of the checkpoint that covers them. A START record opens each attempt and holds the step that it
resumes from, which voids all later steps before it. A LEFT_OUT record says which positions after a
step are never used, since the run has gone back to that step at a spike. Each record ends in its
CRC-32, so that a record cut off by a crash differs from a damaged file.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
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
_START, _STEP, _LEFT_OUT = 1, 2, 3
_KINDS = (_START, _STEP, _LEFT_OUT)
_SHUFFLE = 1


class Skip(IntEnum):
    """Why a step did not change the weights; the flags of its record."""

    NO = 0
    NOT_FINITE = 1
    SPIKE = 2


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
    skip: Skip = Skip.NO
    """Whether the step has changed the weights. Versions that did not record it have NO."""


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
class LeftOut:
    """Positions that are deliberately skipped: the run has gone back at a spike, and goes on after
    them."""

    step: int
    """The step that it has gone back to."""
    start_position: int
    """The first of the positions."""
    count: int
    """Number of positions."""
    spike: int
    """The step that was the spike."""

    @property
    def end_position(self) -> int:
        """The position at which the run goes on."""
        return self.start_position + self.count


@dataclass(frozen=True)
class History:
    """The content of a ledger."""

    steps: list[tuple[StepRecord, AttemptStart]]
    """The steps that are not void, each with the attempt that took it."""
    starts: list[AttemptStart]
    """All attempts, in the order of the file."""
    left_out: list[LeftOut]
    """What is deliberately skipped, and not void."""


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
                if not isinstance(item, LeftOut):
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
        self._append([(_STEP, r.skip, 0, r.step, r.start_position, r.count, r.digest) for r in new])
        if new:
            self.last_step = new[-1].step

    def leave_out(self, left_out: LeftOut) -> None:
        """Appends durably that positions are deliberately skipped."""
        fields = left_out.step, left_out.start_position, left_out.count, left_out.spike
        self._append([(_LEFT_OUT, 0, 0, *fields)])

    def _append(self, rows: list[tuple[int, ...]]) -> None:
        append_bytes(self._file, b"".join(_pack(row) for row in rows), durable=True)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _pack(row: tuple[int, ...]) -> bytes:
    body = _RECORD.pack(*row, 0)[:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def _scan(path: Path) -> Iterator[tuple[int, StepRecord | AttemptStart | LeftOut]]:
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


def _unpack(data: bytes, at: int) -> StepRecord | AttemptStart | LeftOut | None:
    """The record at this offset; None where its kind or its CRC-32 is wrong."""
    raw = data[at : at + _RECORD.size]
    kind, flags, attempt, step, position, first, second, crc = _RECORD.unpack(raw)
    if zlib.crc32(raw[:-4]) != crc or kind not in _KINDS:
        return None
    if kind == _LEFT_OUT:
        return LeftOut(step, position, first, second)
    if kind == _STEP:
        skip = Skip(flags) if flags in set(Skip) else Skip.NO
        return StepRecord(step, position, first, second, skip)
    try:
        order = SampleOrder(first, second, bool(flags & _SHUFFLE))
    except ValueError:  # a number of samples that no data set has
        return None
    return AttemptStart(attempt, step, position, order)


def _valid(data: bytes, at: int) -> bool:
    """Whether a complete record starts at this offset; checks its kind first, for speed."""
    if data[at] not in _KINDS or data[at + 1] != 0:
        return False
    body = data[at : at + _RECORD.size - 4]
    return data[at + len(body) : at + _RECORD.size] == struct.pack("<I", zlib.crc32(body))


def read_steps(path: Path) -> list[StepRecord]:
    """The records of all steps that are not void, in order."""
    return [record for record, _ in read_history(path).steps]


def read_history(path: Path) -> History:
    """Reads the whole ledger. Raises DataError if it is damaged."""
    history, start = History([], [], []), None
    for _, item in _scan(path):
        if isinstance(item, AttemptStart):
            start = item
            history.starts.append(start)
            while history.steps and history.steps[-1][0].step > start.step:
                history.steps.pop()
            while history.left_out and _is_void(history.left_out[-1], start):
                history.left_out.pop()
        elif isinstance(item, LeftOut):
            history.left_out.append(item)
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


def _is_void(left_out: LeftOut, start: AttemptStart) -> bool:
    """Whether an attempt that starts here does not know of the positions that were left out."""
    before = start.step, start.position
    return (left_out.step, left_out.end_position) > before


def goes_on_at(path: Path, step: int, position: int) -> tuple[int, int]:
    """Where a run resumes after ``step``, which ends at ``position``: the position after what was
    left out there, and how often the run has gone back to this step. Raises DataError."""
    if not (_rows(path)["kind"] == _LEFT_OUT).any():
        return position, 0  # without the time to read all records
    left_out = [part for part in read_history(path).left_out if part.step == step]
    if not left_out or left_out[0].start_position != position:
        return position, 0
    return left_out[-1].end_position, len(left_out)


def position_after(path: Path, step: int, position: int, attempt: int | None = None) -> int:
    """Where the step after ``step``, which ends at ``position``, starts in the newest attempt that
    takes it; with ``attempt``, in the newest of those up to this number. What was left out since
    then does not count. Does not notice damage."""
    rows, found = _rows(path), position
    for row in rows[rows["kind"] == _START]:
        if attempt is not None and row["attempt"] > attempt:
            break
        if row["step"] <= step:  # a later one goes on after this step
            found = int(row["position"]) if row["step"] == step else position
    return found


def gone_back_from(path: Path, attempt: int | None = None) -> int | None:
    """The spike at which an attempt, by default the newest one, has gone back to a checkpoint; None
    where it has not. Does not notice damage."""
    rows, spike, number = _rows(path), None, None
    for row in rows[rows["kind"] != _STEP]:
        if row["kind"] == _START:
            number = int(row["attempt"])
            spike = None if attempt is None else spike
        elif attempt in (None, number):
            spike = int(row["second"])
    return spike


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
