"""The start of a run of several ranks: some do not join, or belong to an earlier start."""

import signal
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from tests.support.forked import Command, start_ranks, wait_for
from tests.support.lanes import slow, thinned
from tests.support.ranks import messages_in
from tests.support.runs import TINY, checkpoints, free_port
from train.distributed.process_group import store_of_this_start
from train.distributed.rendezvous import join
from train.distributed.world import World
from train.exits import RetryError


def place(rank, world_size):
    return World(rank, world_size, rank, world_size, "test", "host")


def a_rank_alone(rank, directory, *overrides):
    """Starts one of two ranks; the other one is never started."""
    env = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
    }  # fmt: skip
    return Command("fit", *TINY, f"run.dir={directory}", *overrides, env=env)


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_a_stop_request_while_waiting_for_other_ranks(tmp_path, rank):
    process = a_rank_alone(rank, tmp_path)
    time.sleep(3)  # by now it waits inside torch
    process.signal(signal.SIGTERM)
    done = process.wait(20)
    assert done.returncode == 143
    assert "stopped on request before the first step; no work is lost" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_for_other_ranks_has_a_time_limit(tmp_path, rank):
    done = a_rank_alone(rank, tmp_path, "watchdog.first_timeout=4").wait(60)
    assert done.returncode == 75
    assert "Not all ranks joined within watchdog.first_timeout (4 s)" in done.stderr
    assert "process_group.py" in done.stderr, "the stack must be printed"


@pytest.mark.slow
def test_a_stop_request_during_a_collective_with_a_frozen_rank(tmp_path):
    options = ["checkpoint.every_steps=5", "stop.deadline=4", "stop.margin=1", "task.sleep=0.02"]
    ranks = start_ranks(2, "fit", tmp_path, *options)
    wait_for(ranks[0], lambda: checkpoints(tmp_path))
    ranks[1].signal(signal.SIGSTOP)
    time.sleep(1)
    ranks[0].signal(signal.SIGTERM)
    done = ranks[0].wait(20)
    assert done.returncode == 75
    assert "did not stop within stop.deadline (4 s" in done.stderr
    ranks[1].signal(signal.SIGKILL)
    ranks[1].wait()


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)


def met(store, ranks, timeout=20.0):
    """The name of the rendezvous on each of these ranks of three, which start one by one."""
    names, threads = {}, []

    def start(rank):
        names[rank] = join(messages_in(store.clone()), place(rank, 3), timeout).name

    for rank in ranks:
        threads.append(threading.Thread(target=start, args=(rank,)))
        threads[-1].start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(timeout)
    return names


@pytest.mark.parametrize("order", thinned([[0, 1, 2], [2, 1, 0], [1, 0, 2]], kept=[[2, 1, 0]]))
def test_ranks_join_under_a_new_name_each_time(store, order):
    """The store still has the keys of earlier starts."""
    first, second = met(store, order), met(store, order)
    assert len(first) == len(second) == 3
    assert len(set(first.values())) == len(set(second.values())) == 1
    assert first[0] != second[0]


def test_the_name_of_a_dead_rank_is_not_reused(store):
    messages_in(store).publish("isorun", "dead")
    messages_in(store).publish("dead/from-1", ["token", ""])
    names = met(store, (1, 2, 0))
    assert set(names) == {0, 1, 2}
    assert "dead" not in names.values()


@pytest.mark.parametrize(
    ("rank", "told"),
    [
        (0, "waiting for ranks 1, 2 of 3 to join"),
        (1, "Timed out after 0.3 s waiting for rank 0 to join"),
    ],
)
def test_waiting_for_ranks_ends_with_an_error(store, rank, told):
    with pytest.raises(RetryError, match=told):
        store_of_this_start(store, place(rank, 3), timedelta(seconds=0.3))


def test_a_rank_that_joins_too_late_is_not_admitted(store):
    join(messages_in(store.clone()), place(0, 2), 0.1)
    with pytest.raises(RetryError, match="rank 0 to admit rank 1 on host"):
        join(messages_in(store), place(1, 2), 0.2, grace=0.1)


def test_rank_0_learns_who_joined_and_what_they_sent(store):
    other = threading.Thread(target=join, args=(messages_in(store.clone()), place(2, 3), 20.0))
    other.start()
    joined = join(messages_in(store), place(0, 3), 1.0, greeting="a")
    other.join()
    assert joined.greetings == {0: "a", 2: None}
