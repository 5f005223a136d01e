"""Hosts are lost and come back while torchrun restarts the run."""

import pytest

from tests.real.elastic import LONG, assert_undisturbed, attempts, going_on_with, wait_until
from tests.support.hosts import why_not
from tests.support.runs import checkpoints

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_host_is_lost_and_another_joins(hosts, tmp_path, undisturbed, how):
    agents = [hosts.start_agent(host, tmp_path, *LONG) for host in (0, 1)]
    try:
        wait_until(lambda: going_on_with(tmp_path, 2) and checkpoints(tmp_path), agents[:1])
        if how == "cut off":
            hosts.cut()
        else:
            hosts.lose(1)
        alone = wait_until(lambda: going_on_with(tmp_path, 1), agents[:1])
        hosts.lose(1)
        agents[1].wait()
        hosts.mend()
        agents.append(hosts.start_agent(1, tmp_path, *LONG))
        joined = wait_until(lambda: going_on_with(tmp_path, 2), agents[:1])
        print(f"{how}: the other continues alone after {alone:.1f} s, both after {joined:.1f} s")
        outputs = [agent.communicate(timeout=120) for agent in (agents[0], agents[2])]
        assert [agents[0].returncode, agents[2].returncode] == [0, 0], outputs
    finally:
        hosts.mend()
        for host in (0, 1):
            hosts.lose(host)
    assert [a["world_size"] for a in attempts(tmp_path)] == [2, 1, 2]
    assert_undisturbed(tmp_path, undisturbed)
