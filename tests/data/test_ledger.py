"""The ledger verifies that each position was used once, or names the first fault."""

import os
import resource
import signal
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.ledger import (
    Ledger,
    LeftOut,
    StepRecord,
    goes_on_at,
    gone_back_from,
    position_after,
    read_steps,
    step_digest,
)
from train.data.ledger_check import verify
from train.data.order import SampleOrder
from train.exits import DataError

ORDER = SampleOrder(3, 50)


def record(step, batch=8, start=None, order=ORDER):
    start = (step - 1) * batch if start is None else start
    positions = np.arange(start, start + batch)
    return StepRecord(step, start, batch, step_digest(positions, order.keys(positions)[1]))


def begin(path, resume=0, attempt=1, order=ORDER, position=None):
    ledger = Ledger(path)
    position = resume * 8 if position is None else position
    ledger.begin_attempt(attempt=attempt, resume_step=resume, resume_position=position, order=order)
    return ledger


def write(path, *records):
    ledger = begin(path)
    ledger.append_steps(list(records))
    ledger.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.bin"


def test_a_clean_run(path):
    write(path, *map(record, range(1, 31)))
    report = verify(path, last_step=30)
    assert report.ok
    assert "30 steps, positions 0 to 239, each used exactly once, in 1 attempt(s)" in str(report)


def test_steps_may_differ_in_size(path):
    """A run may be resumed with another batch size, if the user allows it."""
    write(path, record(1), record(2, 12, 8), record(3, 5, 20), record(4, 1, 25))
    assert "4 steps, positions 0 to 25" in str(verify(path, last_step=4))


def test_a_resume_voids_later_steps(path):
    write(path, *map(record, range(1, 11)))
    again = begin(path, resume=6, attempt=2)
    assert again.last_step == 6
    again.append_steps([record(step) for step in range(7, 13)])
    again.close()
    assert verify(path, last_step=12).ok
    assert [r.step for r in read_steps(path)] == list(range(1, 13))


def test_positions_that_were_left_out_are_no_gap(path):
    """At step 10 the run goes back to step 6 twice, and goes on after the samples of step 10, then
    after those of two more steps."""
    ledger = begin(path)
    ledger.append_steps([record(step) for step in range(1, 7)])
    ledger.leave_out(LeftOut(6, 48, 32, 10))
    ledger.close()
    assert goes_on_at(path, 6, 48) == (80, 1)
    assert position_after(path, 6, 48) == 48, "no attempt has gone on yet"
    assert gone_back_from(path) == 10
    again = begin(path, resume=6, attempt=2, position=80)
    again.leave_out(LeftOut(6, 80, 16, 8))
    again.close()
    assert goes_on_at(path, 6, 48) == (96, 2)
    last = begin(path, resume=6, attempt=3, position=96)
    last.append_steps([record(step, start=96 + 8 * (step - 7)) for step in range(7, 10)])
    last.close()
    report = verify(path, last_step=9)
    assert report.ok
    assert "positions 48 to 79 (back from step 10 to 6); positions 80 to 95 (" in str(report)
    assert goes_on_at(path, 5, 40) == (40, 0)
    positions = [position_after(path, 6, 48, attempt) for attempt in (1, 2, 3, None)]
    assert positions == [48, 80, 96, 96]
    assert position_after(path, 5, 40) == 40
    assert [gone_back_from(path, attempt) for attempt in (1, 2, 3, None)] == [10, 8, None, None]


def test_what_was_left_out_is_void_for_an_attempt_that_does_not_know_of_it(path):
    ledger = begin(path)
    ledger.append_steps([record(step) for step in range(1, 7)])
    ledger.leave_out(LeftOut(6, 48, 32, 10))
    ledger.close()
    again = begin(path, resume=4, attempt=2)
    again.append_steps([record(step) for step in range(5, 9)])
    again.close()
    assert goes_on_at(path, 6, 48) == (48, 0)
    assert position_after(path, 6, 48) == 48
    assert "each used exactly once, in 2 attempt(s)" in str(verify(path, last_step=8))


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([record(1), record(3)], "step 2 is missing"),
        ([record(1), record(2, start=10)], "positions 8 to 9 were never used: step 2"),
        ([record(1), record(2, start=5)], "positions 5 to 7 were used twice: step 2"),
        ([record(1), StepRecord(2, 8, 8, 17)], "step 2 did not use the samples"),
        ([record(1), StepRecord(2, 8, 0, 0)], "step 2 cannot have used 0 samples"),
        ([record(1), StepRecord(2, 8, 2**50, 0)], "step 2 cannot have used"),
        ([record(1), record(2, batch=7, start=8), record(3)], "positions 15 to 15 were never used"),
    ],
)
def test_the_first_fault_is_named(path, records, expected):
    write(path, *records)
    report = verify(path)
    assert not report.ok
    assert expected in str(report)


def test_a_missing_end_is_named(path):
    write(path, record(1), record(2))
    assert "ended at step 3, but the ledger ends at 2" in str(verify(path, last_step=3))


def test_a_checkpoint_beyond_the_ledger_is_detected(path):
    """Steps are recorded before the commit of their checkpoint, so no checkpoint may be ahead."""
    write(path, record(1), record(2))
    expected = "there is a checkpoint of step 3, but the ledger ends at 2"
    assert expected in str(verify(path, committed_step=3))
    assert verify(path, committed_step=2).ok
    assert verify(path, committed_step=1).ok


def test_another_seed_is_detected(path):
    write(path, record(1, order=SampleOrder(4, 50)))
    assert "step 1 did not use the samples" in str(verify(path))


def test_an_incomplete_record_at_the_end_is_removed(path):
    write(path, record(1), record(2))
    whole = path.read_bytes()
    for cut in range(len(whole) - 43, len(whole)):
        path.write_bytes(whole[:cut])
        assert "1 steps, positions 0 to 7" in str(verify(path))
        ledger = begin(path, resume=1, attempt=2)
        ledger.append_steps([record(2), record(3)])
        ledger.close()
        assert verify(path, last_step=3).ok


def test_zeros_at_the_end_are_removed(path):
    """Some file systems leave zeros at the end of an append after a power failure."""
    write(path, *map(record, range(1, 10)))
    content = path.read_bytes()
    path.write_bytes(content[: -3 * 44] + bytes(3 * 44))
    assert "6 steps" in str(verify(path))
    Ledger(path).close()
    assert path.read_bytes() == content[: -3 * 44], "all zeros must be removed"
    ledger = begin(path, resume=6, attempt=2)
    ledger.append_steps([record(7)])
    ledger.close()
    assert verify(path, last_step=7).ok


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
        lambda whole: whole[:100] + whole[110:],
        lambda whole: whole[:90] + whole[100:148],
        lambda whole: whole[:100] + b"?" + whole[100:],
    ],
    ids=["changed", "lost", "lost before the last", "added"],
)
def test_damage_in_the_middle_is_an_error(path, damage):
    """In the second record, which starts at byte 60; later records must not be removed."""
    write(path, *map(record, range(1, 10)))
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert "damaged at byte 60:" in str(verify(path))
    with pytest.raises(DataError, match="damaged at byte 60:"):
        Ledger(path)
    assert path.read_bytes() == damaged


def test_every_flipped_bit_is_detected(path):
    """In the records of two steps, with others before and after."""
    write(path, *map(record, range(1, 5)))
    whole = path.read_bytes()
    for byte in range(60, 148):
        changed = whole[byte] ^ 1 << byte % 8
        path.write_bytes(whole[:byte] + bytes([changed]) + whole[byte + 1 :])
        expected = f"damaged at byte {60 if byte < 104 else 104}:"
        assert expected in str(verify(path)), byte


def test_a_flipped_bit_at_the_very_end_loses_that_step(path):
    """It looks like an incomplete record, but a finished run shows that a step is missing."""
    write(path, *map(record, range(1, 5)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "ended at step 4, but the ledger ends at 3" in str(verify(path, last_step=4))


@pytest.mark.parametrize("content", [b"?", b"?" * 16, b"?" * 60])
def test_a_file_that_is_not_a_ledger_is_not_changed(path, content):
    path.write_bytes(content)
    assert not verify(path).ok
    with pytest.raises(DataError, match="is not a ledger"):
        Ledger(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [0, 5, 16])
def test_an_incomplete_header_is_rewritten(path, size):
    write(path)
    path.write_bytes(path.read_bytes()[:size])
    write(path, record(1))
    assert verify(path, last_step=1).ok


def test_a_repeated_record_is_named(path):
    write(path, record(1), record(2))
    path.write_bytes(path.read_bytes() + path.read_bytes()[-44:])
    assert "step 2 is repeated: it follows step 2" in str(verify(path))


def test_a_lost_ledger_is_detected(path):
    """The run resumed from its checkpoint, but earlier steps cannot be verified."""
    ledger = begin(path, resume=6, attempt=2)
    ledger.append_steps([record(7)])
    ledger.close()
    assert "step 1 is missing: step 7 follows 0" in str(verify(path, last_step=7))


def test_each_step_is_checked_with_the_order_of_its_attempt(path):
    other = SampleOrder(4, 61, shuffle=False)
    write(path, *map(record, range(1, 6)))
    ledger = begin(path, resume=3, attempt=2, order=other)
    ledger.append_steps([record(step, order=other) for step in range(4, 9)])
    ledger.close()
    report = verify(path, last_step=8)
    assert report.ok, report
    assert "in 2 attempt(s)" in str(report)


def test_the_block_size_of_verify_does_not_matter(path, monkeypatch):
    write(path, *map(record, range(1, 31)))
    monkeypatch.setattr("train.data.ledger_check._BLOCK", 20)  # three steps
    assert verify(path, last_step=30).ok
    ledger = begin(path, resume=30, attempt=2)
    ledger.append_steps([*map(record, range(31, 36)), StepRecord(36, 280, 8, 1), record(37)])
    ledger.close()
    assert "step 36 did not use the samples" in str(verify(path))


def test_a_reopened_ledger_knows_its_last_step(path):
    write(path, record(1), record(2))
    ledger = Ledger(path)
    assert ledger.last_step == 2
    ledger.close()


def test_recorded_steps_are_not_written_again(path):
    ledger = begin(path)
    ledger.append_steps([record(1), record(2)])
    ledger.append_steps([record(1), record(2), record(3)])
    ledger.close()
    assert [r.step for r in read_steps(path)] == [1, 2, 3]


def test_a_failed_write_leaves_the_file_as_it_was(path, monkeypatch):
    ledger = begin(path)
    ledger.append_steps([record(1)])
    before = path.read_bytes()

    def no_space(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            ledger.append_steps([record(2)])
    assert path.read_bytes() == before
    ledger.append_steps([record(2)])
    ledger.close()
    assert verify(path, last_step=2).ok


def test_a_write_that_stops_halfway_leaves_the_file_as_it_was(path):
    """As on a full disk; here by a limit on the file size."""
    ledger = begin(path)
    ledger.append_steps([record(1)])
    before = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 60, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            ledger.append_steps([record(2), record(3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    ledger.append_steps([record(2), record(3)])
    ledger.close()
    assert verify(path, last_step=3).ok


@given(st.lists(st.integers(0, 40), max_size=5), st.integers(0, 2**40))
def test_parts_of_a_step_add_up(cuts, start):
    positions = np.arange(start, start + 40)
    indices = ORDER.keys(positions)[1]
    bounds = [0, *sorted(cuts), 40]
    parts = [step_digest(positions[a:b], indices[a:b]) for a, b in pairwise(bounds)]
    assert sum(parts) % 2**64 == step_digest(positions, indices)
    assert step_digest(positions, indices[::-1]) != step_digest(positions, indices)


def test_known_digests():
    """Must not change: ledgers are verified long after they were written."""
    assert record(1).digest == 10693367608273386869
    assert step_digest(np.array([10**12]), np.array([28])) == 7142435679676339215
