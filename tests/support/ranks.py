"""Ranks as threads of this process, for code that exchanges through Collectives."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from train.distributed.collectives import Collectives


class ThreadCollectives(Collectives):
    """The exchanges of ranks that are threads; ``slots`` and ``barrier`` are shared by all."""

    def __init__(self, rank, slots, barrier):
        super().__init__(rank, len(slots))
        self._slots, self._barrier = slots, barrier

    def all_gather_object(self, value):
        self._slots[self.rank] = value
        self._barrier.wait(30)
        found = list(self._slots)
        self._barrier.wait(30)
        return found

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
    slots, barrier = [None] * count, threading.Barrier(count)

    def call(rank):
        try:
            return function(ThreadCollectives(rank, slots, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))
