"""Agents on two hosts made of network namespaces: they join, fail, stop, leave and return."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.real.elastic import LONG, assert_undisturbed, going_on_with, wait_until
from tests.support.hosts import why_not
from tests.support.runs import TINY, checkpoints, run
from train.data.ledger import read_steps

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def fit(directory, *overrides):
    return ["python", "-m", "train", "fit", *TINY, f"run.dir={directory}", *overrides]


def both(hosts, command, *options, nnodes="2", env=()):
    return [node(hosts, host, command, *options, nnodes=nnodes, env=env) for host in (0, 1)]


def node(hosts, host, command, *options, nnodes="2", env=()):
    words = ["--nnodes", nnodes, "--rdzv-endpoint", f"{hosts.subnet}.1:29400", *options]
    return hosts.start_node_agent(host, command, *words, env=env)


def end(agents, timeout=180):
    """Waits for the agents; returns their exit codes and standard errors."""
    try:
        errors = [agent.communicate(timeout=timeout)[1] for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.kill()
    return [agent.returncode for agent in agents], errors


@pytest.fixture
def names(hosts):
    """An /etc/hosts file for each host, without the names of the hosts."""
    folders = [Path("/etc/netns") / name for name in hosts.names]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
    yield [folder / "hosts" for folder in folders]
    for folder in folders:
        shutil.rmtree(folder)


def test_a_host_name_that_resolves_only_later(hosts, names, tmp_path):
    command = fit(tmp_path / "two", "batch.micro_batch_size=6")
    agents = [
        hosts.start_node_agent(
            host, command, "--nnodes", "2", "--rdzv-host-env", "NODE_0", "--rdzv-port", "29400",
            env={"NODE_0": "node-0.isorun.test"},
        )
        for host in (0, 1)
    ]  # fmt: skip
    for agent in agents:
        for line in agent.stderr:
            if "Waiting for the name 'node-0.isorun.test'" in line:
                break
    for file in names:
        with file.open("a") as text:
            text.write(f"{hosts.subnet}.1 node-0.isorun.test\n")
    codes, errors = end(agents)
    assert codes == [0, 0], errors
    run("fit", tmp_path / "one")
    assert read_steps(tmp_path / "one/ledger.bin") == read_steps(tmp_path / "two/ledger.bin")


def test_an_unresolvable_host_name(hosts, tmp_path):
    agent = hosts.start_node_agent(
        1, fit(tmp_path), "--nnodes", "2", "--rdzv-endpoint", "nowhere.isorun.test",
        "--rdzv-timeout", "3",
    )  # fmt: skip
    [code], [error] = end([agent])
    assert code == 75
    assert "'nowhere.isorun.test'" in error
    assert "Check its spelling" in error


def test_a_node_that_is_never_started(hosts, tmp_path):
    codes, errors = end([node(hosts, 1, fit(tmp_path), "--rdzv-timeout", "3")])
    assert codes == [75]
    assert f"node 0 to listen at {hosts.subnet}.1:29400" in errors[0]
    codes, errors = end([node(hosts, 0, fit(tmp_path), "--rdzv-timeout", "3")])
    assert codes == [75]
    assert f"waiting for 2 nodes at the rendezvous {hosts.subnet}.1:29400" in errors[0]


@pytest.mark.skipif(shutil.which("iptables") is None, reason="iptables is not installed")
def test_a_blocked_port(hosts, tmp_path):
    rule = ["INPUT", "-p", "tcp", "--dport", "29400", "!", "-i", "lo", "-j", "DROP"]
    iptables = ["ip", "netns", "exec", hosts.names[0], "iptables"]
    made = subprocess.run([*iptables, "-A", *rule], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"iptables cannot be used ({made.stderr.strip()})")
    try:
        codes, errors = end(both(hosts, fit(tmp_path), "--rdzv-timeout", "6"))
    finally:
        subprocess.run([*iptables, "-D", *rule], check=True)
    assert codes == [75, 75], errors
    assert "no firewall" in errors[1]


def test_all_agents_name_the_same_rank(hosts, tmp_path):
    """The ranks of the other host lose their peer, which is worth a retry; the original failure is
    not."""
    script = (
        "import os, socket, sys, time; rank = int(os.environ['RANK']); "
        "time.sleep(2 if rank else 1); sys.exit(75 if rank == 0 else 65)"
    )
    agents = both(hosts, ["python", "-c", script], "--max-restarts", "5")
    codes, errors = end(agents)
    assert codes == [65, 65], errors
    for error in errors:
        assert "Rank 1 on" in error
        assert "exit code 65 (DATA)" in error
        assert "Restarting the ranks" not in error


def test_ranks_that_wait_for_a_failed_rank_are_ended(hosts):
    script = "import os, sys, time; time.sleep(1); os.environ['RANK'] == '1' and sys.exit(70); time.sleep(600)"
    started = time.monotonic()
    codes, errors = end(both(hosts, ["python", "-c", script]))
    assert codes == [70, 70], errors
    assert time.monotonic() - started < 60


def test_both_nodes_restart_their_ranks(hosts, tmp_path):
    script = (
        "import os, sys, time; path = os.environ['SEEN'] + os.environ['RANK']; "
        "first = not os.path.exists(path); open(path, 'w'); "
        "time.sleep(60 if first and os.environ['RANK'] == '0' else 1); sys.exit(75 * first)"
    )
    agents = both(hosts, ["python", "-c", script], "--max-restarts", "1",
                  env={"SEEN": str(tmp_path / "seen")})  # fmt: skip
    codes, errors = end(agents)
    assert codes == [0, 0], errors
    assert all("Restarting the ranks (restart 1 of 1)" in error for error in errors)


def test_a_finished_node_reports_a_later_failure_of_another(hosts):
    script = "import os, sys, time; rank = int(os.environ['RANK']); time.sleep(2 * rank); sys.exit(75 * rank)"
    codes, errors = end(both(hosts, ["python", "-c", script], "--max-restarts", "1"))
    assert codes == [75, 75], errors
    assert "Rank 1 on" in errors[0]


def test_a_failure_is_reported_while_another_rank_of_the_node_hangs(hosts):
    """Otherwise the other host would time out and report a lost node instead of invalid data."""
    script = (
        "import os, signal, sys, time; rank = int(os.environ['RANK']); "
        "rank == 1 and signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "time.sleep(2 if rank == 0 else 600); sys.exit(65)"
    )
    codes, errors = end(both(hosts, ["python", "-c", script], "--nproc-per-node", "2"))
    assert codes == [65, 65], errors
    assert all("Rank 0 on" in error for error in errors)


@pytest.mark.parametrize("early", [0, 1])
def test_a_node_that_finishes_early_does_not_end_the_other(hosts, early):
    """Also the node with the store, and for longer than the timeout for a lost node."""
    script = f"import os, time; time.sleep(1 if os.environ['RANK'] == '{early}' else 40)"
    codes, errors = end(both(hosts, ["python", "-c", script]))
    assert codes == [0, 0], errors


def test_a_node_that_joins_later_is_checked_and_added(hosts):
    script = "import os, sys, time; os.environ['WORLD_SIZE'] == '2' or time.sleep(600)"
    command = ["python", "-c", f"print('started', flush=True); {script}"]
    options = ("--preflight", "quick")
    agents = [node(hosts, 0, command, *options, nnodes="1:2")]
    assert any("started" in line for line in agents[0].stdout)
    agents.append(node(hosts, 1, command, *options, nnodes="1:2"))
    codes, errors = end(agents)
    assert codes == [0, 0], errors
    assert "this node is checked alone" in errors[1]


def test_a_host_that_does_not_respond(hosts):
    """As after a power failure: no connection is closed, but there is no response."""
    agents = both(
        hosts, ["python", "-c", "print('started', flush=True); import time; time.sleep(600)"]
    )
    for agent in agents:
        assert any("started" in line for line in agent.stdout)
    hosts.cut()
    try:
        codes, errors = end(agents, timeout=90)
        assert codes == [75, 75], errors
        assert "Node 1 has sent no heartbeat for 25 s" in errors[0]
        assert "is gone or cannot be reached" in errors[1]
        assert "recvValue" not in errors[1], "torch's stack traces"
    finally:
        hosts.mend()


def test_a_host_that_does_not_respond_while_its_run_stops(hosts):
    """The ranks cannot agree on the stop, so they do not get the whole timeout."""
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('started', flush=True); time.sleep(600)"
    )
    agents = both(hosts, ["python", "-c", script], "--shutdown-timeout", "300")
    for agent in agents:
        assert any("started" in line for line in agent.stdout)
    hosts.cut()
    try:
        agents[1].send_signal(signal.SIGTERM)
        [code], [error] = end([agents[1]], timeout=60)
        assert code == 75, error
        assert "is gone or cannot be reached" in error
    finally:
        hosts.lose(0)
        end(agents[:1])
        hosts.mend()


def test_a_paused_node_rejoins(hosts, tmp_path):
    script = (
        "import os, sys, time; path = os.environ['SEEN'] + os.environ['RANK']; "
        "first = not os.path.exists(path); open(path, 'w'); "
        "print('started', flush=True); time.sleep(600 if first else 1)"
    )
    agents = both(hosts, ["python", "-c", script], "--max-restarts", "1",
                  env={"SEEN": str(tmp_path / "seen")})  # fmt: skip
    for agent in agents:
        assert any("started" in line for line in agent.stdout)
    agents[1].send_signal(signal.SIGSTOP)
    for line in agents[0].stderr:
        if "Restarting the ranks" in line:
            break
    agents[1].send_signal(signal.SIGCONT)
    codes, errors = end(agents, timeout=60)
    assert codes == [0, 0], errors


def test_a_stop_request_to_one_node_saves_and_stops_all(hosts, tmp_path, undisturbed):
    agents = both(hosts, fit(tmp_path, *LONG))
    wait_until(lambda: going_on_with(tmp_path, 2), agents)
    agents[1].send_signal(signal.SIGTERM)
    codes, errors = end(agents)
    assert codes == [143, 143], errors
    assert checkpoints(tmp_path)
    codes, errors = end(both(hosts, fit(tmp_path, *LONG)))
    assert codes == [0, 0], errors
    assert_undisturbed(tmp_path, undisturbed)


def test_a_lost_node_ends_a_run_of_fixed_size(hosts, tmp_path):
    agents = both(hosts, fit(tmp_path, *LONG))
    wait_until(lambda: going_on_with(tmp_path, 2), agents)
    hosts.lose(1)
    codes, errors = end(agents)
    assert codes[0] == 75, errors
    record = json.loads((tmp_path / "failures/0001.json").read_text())
    assert record["retry"]
    assert record["lost_nodes"] == [1]


@pytest.mark.parametrize("how", ["killed", "asked to leave"])
def test_an_elastic_run_continues_and_adds_a_node(hosts, tmp_path, undisturbed, how):
    options = ("--max-restarts", "3" if how == "killed" else "0")
    agents = both(hosts, fit(tmp_path, *LONG), *options, nnodes="1:2")
    try:
        wait_until(lambda: going_on_with(tmp_path, 2) and checkpoints(tmp_path), agents)
        if how == "killed":
            hosts.lose(1)
        else:
            agents[1].send_signal(signal.SIGTERM)
        [code], _ = end([agents[1]])
        assert code == (-9 if how == "killed" else 143)
        wait_until(lambda: going_on_with(tmp_path, 1, after=1), agents[:1])
        back = node(hosts, 1, fit(tmp_path, *LONG), *options, nnodes="1:2")
        wait_until(lambda: going_on_with(tmp_path, 2, after=2), [agents[0], back])
        codes, errors = end([agents[0], back])
        assert codes == [0, 0], errors
    finally:
        for host in (0, 1):
            hosts.lose(host)
    assert_undisturbed(tmp_path, undisturbed)
    assert os.path.exists(tmp_path / "finished.json")
