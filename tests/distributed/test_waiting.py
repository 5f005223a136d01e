"""Lines on what a process waits for, at the start of a run; the ranks are threads here."""

import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from tests.support.ranks import messages_in
from tests.support.runs import free_port
from train.distributed import process_group, rendezvous, waiting
from train.distributed.endpoint import wait_for_port
from train.distributed.process_group import start_group
from train.distributed.rendezvous import join, open_store
from train.distributed.waiting import ranks_of, reported_wait
from train.distributed.world import World
from train.exits import RetryError


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """The first line comes at once."""
    monkeypatch.setattr(waiting, "FIRST_REPORT", 0.05)


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)


class Lines(list):
    """The reported lines."""

    def wait(self, count):
        self._until(lambda: len(self) >= count)

    def wait_for(self, text):
        self._until(lambda: any(text in line for line in self))

    def _until(self, condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, self
            time.sleep(0.005)


def of(rank, world_size=4, local_rank=None):
    return World(
        rank, world_size, rank if local_rank is None else local_rank, world_size, "test", "h"
    )


def in_a_thread(function, *arguments, **named):
    thread = threading.Thread(target=function, args=arguments, kwargs=named, daemon=True)
    thread.start()
    return thread


def test_a_short_wait_is_not_reported(monkeypatch):
    monkeypatch.setattr(waiting, "FIRST_REPORT", 30.0)
    lines = Lines()
    with reported_wait(lambda: "a node", lines.append, lambda: "It is there"):
        pass
    assert lines == []


def test_the_lines_become_rarer_and_the_end_is_reported():
    lines = Lines()
    with reported_wait(lambda: "a node", lines.append, lambda: "It is there"):
        lines.wait(4)
    seconds = [line.rpartition("; ")[2] for line in lines[:4]]
    assert seconds == ["0.05 s so far.", "0.1 s so far.", "0.2 s so far.", "0.4 s so far."]
    assert lines[0] == "Waiting for a node; 0.05 s so far."
    assert lines[-1].startswith("It is there after ")


def test_a_wait_that_fails_has_no_line_on_its_end():
    lines = Lines()

    def fail():
        with reported_wait(lambda: "x", lines.append, lambda: "It is there"):
            lines.wait(1)
            raise RetryError("lost")

    with pytest.raises(RetryError):
        fail()
    assert all(line.startswith("Waiting for x") for line in lines)


def test_a_port_that_nobody_listens_at():
    lines = Lines()
    with pytest.raises(RetryError):
        wait_for_port(
            "127.0.0.1",
            free_port(),
            time.monotonic() + 1,
            "node 0 at h:1",
            "Start it.",
            lines.append,
        )
    assert lines[0].startswith("Waiting for node 0 at h:1 (Connection refused)")


@pytest.mark.usefixtures("address")
def test_rank_0_names_the_missing_ranks_and_where_they_should_come(store):
    lines, silent = Lines(), Lines()
    rank_0 = in_a_thread(join, messages_in(store), of(0), 30, report=lines.append)
    come = [in_a_thread(join, messages_in(store.clone()), of(2), 30, report=silent.append)]
    lines.wait_for("ranks 1, 3 of 4 to join")
    assert "127.0.0.1:" in lines[-1]
    come += [in_a_thread(join, messages_in(store.clone()), of(rank), 30) for rank in (1, 3)]
    for thread in [rank_0, *come]:
        thread.join(30)
    assert lines[-1].startswith("All ranks have joined after ")
    assert silent == [], "it must leave that to rank 0"


@pytest.mark.parametrize(
    ("rank", "local_rank", "speaks"), [(1, 1, True), (2, 2, False), (2, 0, True), (3, 1, False)]
)
def test_one_rank_of_each_node_reports_that_rank_0_is_missing(
    store, rank, local_rank, speaks, monkeypatch
):
    """Rank 0 of an earlier start, which is gone, has left its name in the store."""
    messages_in(store).publish("isorun", "isorun/former")
    store.add("isorun/former/beats", 7)
    monkeypatch.setattr(rendezvous, "_ADMISSION", 0.05)
    lines = Lines()
    with pytest.raises(RetryError):
        join(messages_in(store), of(rank, local_rank=local_rank), 0.5, report=lines.append)
    assert any("Waiting for rank 0 of 4 to join" in line for line in lines) is speaks


def test_other_nodes_are_silent_while_rank_0_reports_who_is_missing(store, monkeypatch):
    monkeypatch.setattr(rendezvous, "_ADMISSION", 0.2)
    monkeypatch.setattr(rendezvous, "_BEAT", 0.01)
    monkeypatch.setattr(waiting, "FIRST_REPORT", 1.0)
    lines = {rank: Lines() for rank in (0, 2)}
    ranks = [
        in_a_thread(
            join, messages_in(store.clone()), of(rank, local_rank=0), 30, report=lines[rank].append
        )
        for rank in (0, 2)
    ]
    lines[0].wait(1)
    assert "Waiting for ranks 1, 3 of 4 to join" in lines[0][0]
    ranks += [in_a_thread(join, messages_in(store.clone()), of(rank), 30) for rank in (1, 3)]
    for thread in ranks:
        thread.join(30)
    assert lines[2] == []


@pytest.mark.usefixtures("address")
def test_a_rank_reports_that_the_store_of_rank_0_does_not_answer():
    lines = Lines()
    with pytest.raises(RetryError):
        open_store(of(1), 1, report=lines.append)
    assert "Waiting for the store of rank 0 at 127.0.0.1:" in lines[0]


@pytest.mark.usefixtures("address")
def test_rank_0_names_ranks_that_have_joined_but_do_not_connect(monkeypatch):
    """As where a firewall blocks all ports but that of the store."""
    world, lines, connect = of(0, 2), Lines(), threading.Event()

    def blocked(_backend, *, store, **_):
        store.set("busy", "")
        assert connect.wait(30)

    monkeypatch.setattr(process_group.dist, "init_process_group", blocked)
    limit = timedelta(seconds=30)
    ranks = [in_a_thread(start_group, world, "gloo", limit, lines.append)]
    ranks.append(in_a_thread(start_group, of(1, 2), "gloo", limit, lines.append))
    lines.wait(1)
    assert any("ranks 0, 1 of 2 to connect to the others" in line for line in lines)
    connect.set()
    for thread in ranks:
        thread.join(30)
    assert lines[-1].startswith("All ranks are connected after ")


def test_many_ranks_are_not_all_listed():
    assert ranks_of([3], 4) == "rank 3 of 4"
    assert ranks_of(list(range(1, 512)), 512) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 ... of 512"
