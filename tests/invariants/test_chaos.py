"""I3 and I4 under random faults: a restarted run ends like the run without faults."""

import pytest

from tests.support.chaos import FAULTS, run_many, why_not

RUNS = len(FAULTS)  # the first fault of each run is another; `make chaos` starts more of them
FIRST_SEED = 2026


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_runs_under_random_faults_end_like_the_run_without_faults(tmp_path):
    for fault in FAULTS:
        if reason := why_not(fault):
            print(f"skipped fault: {fault}: {reason}")
    lines = []
    failures = run_many(range(FIRST_SEED, FIRST_SEED + RUNS), tmp_path, report=lines.append)
    print("\n".join(lines))
    assert not failures, failures
    assert len(lines) == RUNS
    assert sum("none" not in line.split(";")[0] for line in lines) == RUNS, (
        "each run must have a fault"
    )
