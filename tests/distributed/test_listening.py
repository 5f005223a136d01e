"""A store listens where its users need it, and nowhere else."""

import socket
import threading
from datetime import timedelta

import pytest

from launch.agent.options import parse
from launch.agent.rendezvous import join
from launch.agent.store import listening_address
from launch.doctor.checks.network import Listener, ask
from tests.support.lanes import slow
from tests.support.runs import free_port
from train.distributed.listening import address_to_listen_at, open_listening_store
from train.distributed.messages import Messages
from train.distributed.process_group import use_loopback
from train.distributed.rendezvous import join as join_ranks
from train.distributed.rendezvous import open_store
from train.distributed.world import World
from train.exits import RetryError
from train.signing import MessageError, Signer

OTHER = "127.0.0.2"  # on Linux all of 127.0.0.0/8 belongs to the host


def reaches(address, port):
    try:
        socket.create_connection((address, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def world(rank, local_size=2):
    return World(rank, 2, rank, local_size, "test", "host")


def test_a_store_listens_at_its_address_only():
    store = open_listening_store("127.0.0.1", 0, "", timedelta(seconds=10))
    assert reaches("127.0.0.1", store.port)
    assert not reaches(OTHER, store.port)
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_the_store_of_the_ranks_of_one_host_is_at_the_loopback_address():
    """Wherever MASTER_ADDR points."""
    port = free_port()
    environ = {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(port)}
    store = open_store(world(0), 10.0, environ)
    assert not reaches(OTHER, port)
    other = open_store(world(1), 10.0, environ)
    store.set("key", "value")
    assert other.get("key") == b"value"


def test_a_port_that_is_taken_is_an_error_of_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with pytest.raises(RetryError, match=f"Cannot open .*:{port}.*in use"):
            open_store(world(0), 10.0, environ)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "127.0.0.1"), (OTHER, OTHER), ("192.0.2.1", ""), ("localhost", ""), ("", "")],
)
def test_only_a_numeric_address_of_this_host_is_listened_at(host, expected):
    assert address_to_listen_at(host) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "127.0.0.1"),
        (["--local-addr", OTHER], "127.0.0.1"),
        (["--nnodes", "2", "--rdzv-endpoint", OTHER], OTHER),
        (["--nnodes", "2", "--rdzv-endpoint", "localhost", "--local-addr", "127.0.0.1"], "127.0.0.1"),
        (["--nnodes", "2", "--rdzv-endpoint", "localhost", "--local-addr", OTHER], ""),
        (["--nnodes", "2", "--rdzv-endpoint", "localhost"], ""),
        (["--nnodes", "2", "--rdzv-endpoint", "nowhere.invalid", "--local-addr", OTHER], ""),
        (["--nnodes", "2", "--rdzv-endpoint", "192.0.2.1", "--local-addr", OTHER], ""),
    ],
)  # fmt: skip
def test_where_node_0_listens(words, expected):
    assert listening_address(parse([*words, "--", "true"], {})) == expected


def test_both_stores_of_a_single_node_are_at_the_loopback_address():
    handler = join(parse(["--", "true"], {}))
    info = handler.next_rendezvous().bootstrap_store_info
    for port in (handler._store.port, info.master_port):
        assert reaches("127.0.0.1", port)
        assert not reaches(OTHER, port)
    handler.shutdown()


def test_the_second_rendezvous_of_an_agent_uses_the_port_of_the_first():
    words = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--node-rank", "0"]
    options = parse([*words, "--", "true"], {})
    first = join(options, "preflight")
    second = join(options, former=first)
    del first
    assert not second.is_closed()
    assert not reaches(OTHER, options.port)


def test_the_listener_of_the_doctor_serves_a_limited_number_of_bytes():
    listener = Listener("127.0.0.1")
    assert not reaches(OTHER, listener.port)
    with socket.create_connection(("127.0.0.1", listener.port), timeout=10) as greedy:
        reader = greedy.makefile("rb")
        for _ in range(5):
            greedy.sendall(b"?")
            assert reader.readline().startswith(listener.token.encode())
        assert reader.read() == b"", "the listener has closed the connection"
    assert ask("127.0.0.1", listener.port, listener.token)[0] >= 0


def test_something_that_answers_without_end_is_not_the_doctor():
    def talk(server):
        connection, _ = server.accept()
        with connection:
            connection.recv(1)
            connection.sendall(b"x" * 1000)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=talk, args=(server,), daemon=True).start()
        with pytest.raises(OSError, match="something else answers"):
            ask("127.0.0.1", server.getsockname()[1], "token")


# -- ranks that join each other --------------------------------------------------------------------


def together(*signers):
    """Ranks with these signers join; their results or errors."""
    port = free_port()
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found, stores = {}, {}

    def come(rank, signer):
        try:
            store = stores[rank] = open_store(world(rank), 20.0, environ)
            found[rank] = join_ranks(Messages(store, signer), world(rank), 2.0, greeting=rank)
        except RetryError as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=pair) for pair in enumerate(signers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_with_one_secret_join():
    signer = Signer(b"a secret of the run", "run")
    found = together(signer, signer)
    assert found[0].greetings == {0: 0, 1: 1}
    assert found[0].name == found[1].name


@pytest.mark.parametrize(
    "other", [Signer(), *map(slow, [Signer(b"another secret", "run"), Signer(b"s", "x")])]
)
def test_a_rank_without_the_secret_is_not_admitted(other):
    found = together(Signer(b"s", "run"), other)
    assert isinstance(found[1], MessageError)
    assert found[0].greetings == {0: 0}


def test_gloo_of_one_host_uses_the_loopback_interface_unless_told_otherwise():
    environ = {}
    use_loopback(environ)
    assert environ == {"GLOO_SOCKET_IFNAME": "lo"}
    environ = {"GLOO_SOCKET_IFNAME": "eth1"}
    use_loopback(environ)
    assert environ == {"GLOO_SOCKET_IFNAME": "eth1"}


@pytest.mark.timeout(60)
def test_stores_with_one_port_number_at_two_addresses_are_two_stores():
    """The system gives any two stores of a process the same free port at times: those of the
    rendezvous and of the ranks listen at different addresses."""
    limit = timedelta(seconds=5)
    first = open_listening_store("127.0.0.1", 0, "", limit)
    second = open_listening_store("127.0.0.2", first.port, "", limit)
    first.set("key", "first")
    second.set("key", "second")
    assert (first.get("key"), second.get("key")) == (b"first", b"second")
