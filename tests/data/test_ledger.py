"""The ledger proves that each position was used once, and names the first fault if not."""

import os
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.ledger import Ledger, StepRecord, read_steps, step_digest, verify
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


def test_steps_after_the_point_of_resumption_never_happened(path):
    write(path, *map(record, range(1, 11)))
    again = begin(path, resume=6, attempt=2)
    assert again.last_step == 6
    again.append_steps([record(step) for step in range(7, 13)])
    again.close()
    assert verify(path, last_step=12).ok
    assert [r.step for r in read_steps(path)] == list(range(1, 13))


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([record(1), record(3)], "step 2 is missing"),
        ([record(1), record(2, start=10)], "positions 8 to 9 were never used: step 2"),
        ([record(1), record(2, start=5)], "positions 5 to 7 were used twice: step 2"),
        ([record(1), StepRecord(2, 8, 8, 17)], "step 2 did not use the samples"),
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
    assert "ended at step 3, but the ledger at 2" in str(verify(path, last_step=3))


def test_another_seed_is_found_out(path):
    write(path, record(1, order=SampleOrder(4, 50)))
    assert "step 1 did not use the samples" in str(verify(path))


def test_a_torn_end_is_repaired_wherever_it_tore(path):
    write(path, record(1), record(2))
    whole = path.read_bytes()
    for cut in range(len(whole) - 43, len(whole)):
        path.write_bytes(whole[:cut])
        assert verify(path).ok
        ledger = begin(path, resume=1, attempt=2)
        ledger.append_steps([record(2), record(3)])
        ledger.close()
        assert verify(path, last_step=3).ok


def test_damage_in_the_middle_is_an_error(path):
    write(path, *map(record, range(1, 10)))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert "damaged at byte" in str(verify(path))
    with pytest.raises(DataError, match="damaged at byte"):
        Ledger(path)


def test_steps_already_on_record_are_not_written_again(path):
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


@given(st.lists(st.integers(0, 40), max_size=5), st.integers(0, 2**40))
def test_parts_of_a_step_add_up(cuts, start):
    positions = np.arange(start, start + 40)
    indices = ORDER.keys(positions)[1]
    bounds = [0, *sorted(cuts), 40]
    parts = [step_digest(positions[a:b], indices[a:b]) for a, b in pairwise(bounds)]
    assert sum(parts) % 2**64 == step_digest(positions, indices)
    assert step_digest(positions, indices[::-1]) != step_digest(positions, indices)
