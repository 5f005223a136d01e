"""A request to stop while nodes join each other; the nodes are threads here."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from launch.agent import keepalive
from launch.agent.keepalive import end_connections, set_keepalive
from launch.agent.options import parse
from launch.agent.rendezvous import has_started, join
from launch.agent.signals import Signals, StopSignal
from launch.contract import UsageError
from tests.support.forked import quick
from tests.support.runs import ROOT, free_port

pytestmark = pytest.mark.normal


@pytest.fixture(autouse=True)
def log_of_the_rendezvous(caplog):
    """A test that fails shows what torch's rendezvous did, and when."""
    caplog.set_level(logging.DEBUG, "torch.distributed.elastic.rendezvous.dynamic_rendezvous")


@pytest.fixture
def nodes():
    """The rendezvous of two nodes."""
    port = free_port()
    words = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-timeout", "60"]
    joined = [join(parse([*words, "--node-rank", str(n), "--", "true"], {})) for n in range(2)]
    yield joined
    for handler in joined:
        handler.shutdown()


@pytest.fixture
def signals():
    made = Signals()
    made.install()
    return made


def test_keepalive_is_set_on_connections_to_the_port_alone():
    unix = socket.socketpair()  # the name of the other side is empty
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            set_keepalive(port)
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    for side in unix:
        assert side.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        side.close()


def test_connections_are_ended_without_a_leak_of_descriptors(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, (tmp_path / "file").open("w"):
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            before = len(os.listdir("/proc/self/fd"))
            end_connections(port)
            set_keepalive(port)
            assert len(os.listdir("/proc/self/fd")) == before
            with pytest.raises(BrokenPipeError):
                client.send(b"x")


def test_a_paused_process_that_does_not_answer_is_noticed(monkeypatch):
    monkeypatch.setattr(keepalive, "_ANSWER", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            set_keepalive(port)
            client.send(b"x")
            with pytest.raises(BlockingIOError):
                client.recv(1)


NODES = """
import logging, sys, threading
from launch.agent.options import parse
from launch.agent.rendezvous import join

logging.basicConfig(format="%(asctime)s %(threadName)s %(message)s")
rendezvous = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
logging.getLogger(rendezvous).setLevel(logging.DEBUG)
"""


def in_a_process(program, address):
    """The lines that a program with several nodes prints. It has a process of its own: a node that
    sends no keep-alive for some seconds is removed, and the process of the tests may be busy that
    long with something else."""
    done = subprocess.run(
        **quick([sys.executable, "-c", NODES + program, address]), cwd=ROOT,
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


REPLACED = """
from launch.agent.rendezvous import forget_round

words = ["--nnodes", "2", "--rdzv-endpoint", sys.argv[1], "--rdzv-timeout", "60"]

def node(number, address):
    return join(parse([*words, "--node-rank", str(number), "--local-addr", address, "--", "true"], {}))

def round_with(other):
    found = {}
    thread = threading.Thread(target=lambda: found.update(other=other.next_rendezvous()), daemon=True)
    thread.start()
    found["stays"] = stays.next_rendezvous()
    thread.join(60)
    print(*[(name, i.rank, i.bootstrap_store_info.master_addr) for name, i in sorted(found.items())])

stays, lost = node(0, "127.0.0.5"), node(1, "127.0.0.7")
round_with(lost)
lost._stop_heartbeats()
forget_round(stays)
replaces = node(1, "127.0.0.3")
round_with(replaces)
for handler in (stays, replaces):
    handler.shutdown()
"""


@pytest.mark.slow
def test_the_address_of_rank_0_is_that_of_the_new_round():
    """A node that was rank 0 becomes rank 1, since the node that replaces a lost one comes first in
    the order of addresses."""
    first, second = in_a_process(REPLACED, f"127.0.0.1:{free_port()}")
    assert first == "('other', 1, '127.0.0.5') ('stays', 0, '127.0.0.5')"
    assert second == "('other', 0, '127.0.0.3') ('stays', 1, '127.0.0.3')"


def in_a_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_a_signal_while_this_node_waits_for_another_one_ends_the_wait(nodes, signals):
    signals.interruptible = lambda: not has_started(nodes[0], None)
    in_a_thread(lambda: (time.sleep(1), os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(StopSignal):
        nodes[0].next_rendezvous()


JOINED = """
import os, signal, time
from launch.agent.rendezvous import has_started, round_of
from launch.agent.signals import Signals

words = ["--nnodes", "2", "--rdzv-endpoint", sys.argv[1], "--rdzv-timeout", "60"]
nodes = [join(parse([*words, "--node-rank", str(n), "--", "true"], {})) for n in range(2)]
signals = Signals()
signals.install()
signals.interruptible = lambda: not has_started(nodes[0], None)

def join_later():
    time.sleep(1)
    nodes[1].next_rendezvous()

def stop_at_once():
    while not has_started(nodes[0], None):
        time.sleep(0.2)  # torch waits for the same connection
    os.kill(os.getpid(), signal.SIGTERM)

threads = [threading.Thread(target=each, daemon=True) for each in (join_later, stop_at_once)]
for each in threads:
    each.start()
print(nodes[0].next_rendezvous().world_size)
for each in threads:
    each.join(60)
print(signals.first == signal.SIGTERM)
print(has_started(nodes[0], round_of(nodes[0])))
for each in nodes:
    each.shutdown()
"""


def test_a_signal_after_all_nodes_have_joined_does_not():
    """The other nodes start their ranks, which would wait for those of this node. torch notices up
    to a second later that the last node has joined."""
    size, signalled, started = in_a_process(JOINED, f"127.0.0.1:{free_port()}")
    assert (size, signalled) == ("2", "True")
    assert started == "False", "of a former round"


@pytest.mark.parametrize("other", ["3", "1:2", "2:3"])
def test_a_node_with_another_number_of_nodes_is_refused(nodes, other):
    """torch would let it join; the round would then be complete for no node."""
    address = f"127.0.0.1:{nodes[0]._store.port}"
    words = ["--nnodes", other, "--rdzv-endpoint", address, "--node-rank", "1", "--", "true"]
    with pytest.raises(UsageError, match=f"--nnodes is {other}, but .* has --nnodes 2; give"):
        join(parse(words, {}))


WAITS = """
import time
from launch.agent.rendezvous import missing_nodes

words = ["--nnodes", "2", "--rdzv-endpoint", sys.argv[1], "--rdzv-timeout", "60"]
options = parse([*words, "--node-rank", "0", "--local-addr", "127.0.0.5", "--", "true"], {})
first = join(options)
print(missing_nodes(options, first), flush=True)
waits = threading.Thread(target=first.next_rendezvous, daemon=True)
waits.start()
while "joined: none" in missing_nodes(options, first):
    time.sleep(0.01)
print(missing_nodes(options, first), flush=True)
second = join(parse([*words, "--node-rank", "1", "--", "true"], {}))
second.next_rendezvous()
waits.join(60)
print(missing_nodes(options, first), flush=True)
late = join(parse([*words, "--node-rank", "1", "--", "true"], {}))
late._state_holder.sync()
print(missing_nodes(options, late), flush=True)
print(missing_nodes(options, object()), flush=True)
for handler in (first, second):
    handler.shutdown()
"""


def test_what_a_node_waits_for():
    address = f"127.0.0.1:{free_port()}"
    none, one, both, late, unknown = in_a_process(WAITS, address)
    assert none == f"2 of 2 nodes at the rendezvous {address} (joined: none)"
    assert one == f"1 of 2 nodes at the rendezvous {address} (joined: 127.0.0.5)"
    assert "the addresses and ranks of the other nodes" in both
    assert late.startswith("the 2 nodes that run at ")
    assert unknown == f"other nodes at the rendezvous {address}"
