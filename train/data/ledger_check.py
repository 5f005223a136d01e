"""Checks that a ledger has each position of the training stream once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.data.ledger import LeftOut, Skip, StepRecord, read_history, sample_digests
from train.data.order import SampleOrder
from train.exits import DataError
from train.suggest import listed

_BLOCK = 1 << 18  # positions verified at once
_LARGEST_STEP = 1 << 30  # samples; larger than any real batch, small enough for memory


@dataclass(frozen=True)
class LedgerReport:
    """The result of ``verify``: whether the ledger is valid, and one sentence on it."""

    ok: bool
    text: str

    def __str__(self) -> str:
        return self.text


def verify(path: Path, *, last_step: int | None = None, committed_step: int = 0) -> LedgerReport:
    """Checks that each position of the stream was used exactly once, or deliberately skipped, or
    names the first fault.

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
    fault = _first_break([record for record, _ in records], history.left_out)
    fault = fault or _first_wrong_digest(records)
    if fault is None and last_step is not None and step != last_step:
        fault = f"the run ended at step {last_step}, but the ledger ends at {step}"
    if fault is None and step < committed_step:
        fault = f"there is a checkpoint of step {committed_step}, but the ledger ends at {step}"
    if fault is not None:
        return LedgerReport(False, fault)
    if not records:
        return LedgerReport(True, "no step is committed yet")
    last = records[-1][0]
    skipped = _skips([record for record, _ in records], history.left_out)
    return LedgerReport(
        True,
        f"{step} steps, positions 0 to {last.start_position + last.count - 1}, each used exactly "
        f"once{skipped}, in {len(history.starts)} attempt(s)",
    )


def _skips(records: list[StepRecord], left_out: list[LeftOut]) -> str:
    """Which steps did not change the weights and what was left out, to go on with a sentence."""
    named = {Skip.NOT_FINITE: "not finite", Skip.SPIKE: "a spike"}
    found = [f"{record.step} ({named[record.skip]})" for record in records if record.skip]
    skips = [f"step{'s' * (len(found) > 1)} {listed(found, 5)}"] if found else []
    skips += [
        f"positions {part.start_position} to {part.end_position - 1} (back from step {part.spike} "
        f"to {part.step})"
        for part in left_out
    ]
    return f" or deliberately skipped ({listed(skips, 6, separator='; ')})" if skips else ""


def _first_break(records: list[StepRecord], left_out: list[LeftOut]) -> str | None:
    """The first step that is missing or repeated, or whose positions leave a gap or overlap."""
    position, after = 0, {(part.step, part.start_position): part for part in left_out}
    for step, record in enumerate(records, start=1):
        while part := after.get((step - 1, position)):
            position += max(1, part.count)
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

    Recomputes the digests of many steps at once.
    """
    begin = 0
    while begin < len(records):
        order, end, samples = records[begin][1], begin, 0
        first = records[begin][0].start_position
        while (
            end < len(records)
            and records[end][1] is order
            and samples < _BLOCK
            and records[end][0].start_position == first + samples  # nothing is left out
        ):
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
