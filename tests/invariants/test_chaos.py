"""I3 and I4 under everything at once: whatever is done to a run, started again it becomes the
run that was never disturbed."""

import pytest

from tests.support.chaos import FAULTS, run_many, why_not

RUNS = 54  # six times each fault
FIRST_SEED = 2026


def test_a_few_runs_under_faults_end_as_if_undisturbed(tmp_path):
    """All ranks killed, all asked to stop, and a bit flipped, each followed by others."""
    lines = []
    failures = run_many(range(FIRST_SEED, FIRST_SEED + 6, 2), tmp_path, report=lines.append)
    print("\n".join(lines))
    assert not failures, failures
    assert len(lines) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_runs_under_random_faults_end_as_if_undisturbed(tmp_path):
    for fault in FAULTS:
        if reason := why_not(fault):
            print(f"left out: {fault}, since {reason}")
    lines = []
    failures = run_many(range(FIRST_SEED, FIRST_SEED + RUNS), tmp_path, report=lines.append)
    print("\n".join(lines))
    assert not failures, failures
    assert len(lines) == RUNS
    assert sum("none" not in line.split(";")[0] for line in lines) == RUNS, "each had a fault"
