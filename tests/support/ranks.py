"""Ranks as threads of this process, for code that exchanges through Collectives."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from train.distributed.collectives import Collectives
from train.distributed.messages import Messages
from train.distributed.plain_data import decode, encode
from train.signing import Signer


class ThreadCollectives(Collectives):
    """The exchanges of ranks that are threads; ``slots``, ``barrier`` and ``turn`` are shared.

    A rank runs only while it holds ``turn``: the ranks share the global random generators, and
    torch can block for ever when two threads read their states.
    """

    def __init__(self, rank, slots, barrier, turn):
        super().__init__(rank, len(slots))
        self._slots, self._barrier, self._turn = slots, barrier, turn

    def _exchange(self, value):
        self._slots[self.rank] = value
        self._wait_for_others()
        found = list(self._slots)
        self._wait_for_others()
        return found

    def all_gather_object(self, value):
        return [decode(data) for data in self._exchange(encode(value))]

    def all_gather_pickled(self, value):
        return self._exchange(value)

    def _wait_for_others(self):
        self._turn.release()
        try:
            self._barrier.wait(30)
        finally:
            self._turn.acquire()

    def broadcast_object(self, value):
        return self.all_gather_object(value)[0]

    def broadcast_pickled(self, value):
        return self._exchange(value)[0]

    def all_gather_floats(self, values):
        return self._exchange([float(value) for value in values])

    def start_all_reduce_ints(self, values):
        gathered = self._exchange(list(values))
        return lambda: [sum(column) for column in zip(*gathered, strict=True)]

    def start_all_reduce(self, tensor):
        gathered = self._exchange(tensor.clone())
        tensor.copy_(torch.stack(gathered).sum(0))
        return lambda: tensor

    def broadcast(self, tensor):
        tensor.copy_(self._exchange(tensor.clone())[0])


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


def messages_in(store):
    """The messages of ranks in a store, of a run without a secret."""
    return Messages(store, Signer())
