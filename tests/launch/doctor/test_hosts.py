"""The doctor on two hosts made of network namespaces."""

import pytest

from tests.launch.doctor.doctors import FIT, doctor
from tests.support.hosts import Hosts, ip, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def hosts():
    hosts = Hosts()
    yield hosts
    hosts.close()


def examine(hosts, tmp_path, names, expect=0):
    """``names``: the interface for gloo on each host."""
    return doctor(
        tmp_path, nodes=2, command=[*FIT, f"run.dir={tmp_path}/run"], expect=expect,
        env={"MASTER_ADDR": f"{hosts.subnet}.1", "MASTER_PORT": "29500"},
        each=[{"GLOO_SOCKET_IFNAME": name} if name else {} for name in names],
        before=[["ip", "netns", "exec", name] for name in hosts.names],
    )  # fmt: skip


@pytest.mark.slow
def test_two_hosts_that_reach_each_other(hosts, tmp_path):
    told = examine(hosts, tmp_path, hosts.cables)
    assert told.only("network", "ok")
    assert told.only("all-reduce", "ok")


@pytest.mark.slow
def test_a_host_name_that_resolves_to_a_loopback_address(hosts, tmp_path):
    told = examine(hosts, tmp_path, [hosts.cables[0], None], expect=64)
    failed = told.only("network", "failed")
    assert failed["node"] == told.report["nodes"][1]
    assert "an address that only it can use" in failed["text"]
    assert "set GLOO_SOCKET_IFNAME" in failed["advice"]
    assert told.only("all-reduce", "skipped"), (
        "the all-reduce must be skipped, as it would time out"
    )


@pytest.mark.slow
def test_a_host_that_cannot_be_reached_at_its_published_address(hosts, tmp_path):
    far = f"{hosts.cables[1]}x"
    ip("-n", hosts.names[1], "link", "add", far, "type", "veth", "peer", "name", f"{far}y")
    ip("-n", hosts.names[1], "addr", "add", f"10.214.{hosts.subnet.split('.')[2]}.2/24", "dev", far)
    for end in (far, f"{far}y"):
        ip("-n", hosts.names[1], "link", "set", end, "up")
    told = examine(hosts, tmp_path, [hosts.cables[0], far], expect=75)
    failed = told.only("network", "failed")
    assert failed["node"] == told.report["nodes"][1]
    assert failed["text"].startswith("cannot be reached at 10.214.")
    assert "open all TCP ports" in failed["advice"]
