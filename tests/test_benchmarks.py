"""All that the benchmarks compare is the same training: losses equal those of the plain loop."""

import pytest

from benchmarks.contenders import CONTENDERS
from benchmarks.raw_loops import RAW
from benchmarks.scaling import ours
from benchmarks.team import Team
from benchmarks.timing import ENVIRONMENT
from benchmarks.workload import WARM_STEPS, Size

pytestmark = pytest.mark.slow
SMALL = Size("small", layers=1, heads=1, width=8, context=8, batch=4, steps=30, rounds=1)
STEPS = WARM_STEPS + SMALL.steps


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}.items():
            patched.setenv(name, value)
        yield


def losses(name, train, ranks=1):
    """The losses of the first steps; ``turn`` returns when a turn begins or ends."""
    team = Team(name, train, [SMALL], ranks)
    try:
        assert team.turn()  # builds and warms up
        assert team.turn() > 0
        return team.last().losses[:STEPS]
    finally:
        team.end()


@pytest.fixture(scope="module")
def of_the_bare_loop():
    found = losses("bare PyTorch", CONTENDERS["bare PyTorch"])
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize("name", ["isorun", "Accelerate"])
def test_each_loop_trains_as_the_plain_loop_does(of_the_bare_loop, name):
    assert losses(name, CONTENDERS[name]) == pytest.approx(of_the_bare_loop, rel=1e-6)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_each_strategy_trains_as_the_hand_written_loop_does(strategy):
    by_hand = losses(f"raw {strategy}", RAW[strategy], ranks=2)
    assert losses(strategy, ours(strategy), ranks=2) == pytest.approx(by_hand, rel=1e-5)
