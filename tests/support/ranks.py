"""Ranks as threads of this process, for code that exchanges through Collectives."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from train.distributed.collectives import Collectives


class ThreadCollectives(Collectives):
    """The exchanges of ranks that are threads; ``slots``, ``barrier`` and ``turn`` are shared.

    A rank runs only while it holds ``turn``: the ranks share the global random generators, and
    torch can block for ever when two threads read their states.
    """

    def __init__(self, rank, slots, barrier, turn):
        super().__init__(rank, len(slots))
        self._slots, self._barrier, self._turn = slots, barrier, turn

    def all_gather_object(self, value):
        self._slots[self.rank] = value
        self._wait_for_others()
        found = list(self._slots)
        self._wait_for_others()
        return found

    def _wait_for_others(self):
        self._turn.release()
        try:
            self._barrier.wait(30)
        finally:
            self._turn.acquire()

    def broadcast_object(self, value):
        return self.all_gather_object(value)[0]

    def all_gather_floats(self, values):
        return self.all_gather_object([float(value) for value in values])

    def start_all_reduce_ints(self, values):
        gathered = self.all_gather_object(list(values))
        return lambda: [sum(column) for column in zip(*gathered, strict=True)]

    def start_all_reduce(self, tensor):
        gathered = self.all_gather_object(tensor.clone())
        tensor.copy_(torch.stack(gathered).sum(0))
        return lambda: tensor

    def broadcast(self, tensor):
        tensor.copy_(self.all_gather_object(tensor.clone())[0])


def on_ranks(count, function):
    """Calls ``function(collectives)`` on each rank; returns the results ordered by rank, an
    exception that was raised among them."""
    slots, barrier, turn = [None] * count, threading.Barrier(count), threading.Lock()

    def call(rank):
        with turn:
            try:
                return function(ThreadCollectives(rank, slots, barrier, turn))
            except Exception as error:
                return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))
