"""Checks that all ranks call the modules that gather their parameters alike.

Each such call is an exchange between ranks: where one rank calls a module that another does not, as
with experts that are chosen by the data or layers that are dropped at random, both would wait until
the time limit, or compute with mixed up parameters. In the first step each call is compared before
it gathers; later, all calls of a forward pass are compared before the backward pass.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from train.distributed.collectives import Collectives
from train.exits import UsageError

_END = -1


@contextmanager
def same_calls(modules: Mapping[str, nn.Module], collectives: Collectives) -> Iterator[None]:
    """Compares the calls between ranks before each gathers anything; collective. Raises UsageError
    on all ranks at the first that differs. Slow: one exchange per call."""
    if not modules or collectives.world_size == 1:
        yield
        return
    names = list(modules)

    def compare(index: int, *_: Any) -> None:
        calls = [int(call) for [call] in collectives.all_gather_floats([index])]
        _refuse_difference([[call] for call in calls], names)

    hooks = [
        module.register_forward_pre_hook(partial(compare, index), prepend=True)
        for index, module in enumerate(modules.values())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    compare(_END)


class CallRecord:
    """The calls on this rank since ``clear``. Compiled modules are not recorded."""

    def __init__(self, modules: Mapping[str, nn.Module], collectives: Collectives) -> None:
        self.names, self._collectives = list(modules), collectives
        self._calls = array("l")
        for index, module in enumerate(modules.values()):
            module.register_forward_pre_hook(partial(self._record, index))

    def _record(self, index: int, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._calls.append(index)

    def clear(self) -> None:
        """Starts anew."""
        del self._calls[:]

    def numbers(self) -> list[int]:
        """Numbers of this rank. Their sums over all ranks show whether all made the same calls."""
        digest = zlib.crc32(self._calls.tobytes()) >> 8  # 24 bits: sums of squares do not overflow
        return [digest, digest * digest]

    def check(self, sums: Sequence[int]) -> None:
        """Raises UsageError on all ranks where the sums of ``numbers`` differ between ranks;
        collective."""
        total, squares = sums
        if total * total != self._collectives.world_size * squares:
            by_rank = self._collectives.all_gather_object(self._calls.tolist())
            _refuse_difference([[*calls, _END] for calls in by_rank], self.names)


def _refuse_difference(by_rank: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Raises UsageError for the first call in which a rank differs from rank 0."""
    for rank, calls in enumerate(by_rank):
        for one, other in zip(by_rank[0], calls, strict=False):
            if one != other:
                own, others = ("no module" if c == _END else names[c] for c in (one, other))
                raise UsageError(
                    f"Rank 0 calls {own} where rank {rank} calls {others}, but the strategy "
                    "gathers the parameters of these modules at each call, for which all ranks "
                    "must call them in the same order; with fsdp2, return modules around them that "
                    "each rank calls in the task's blocks(), or use strategy=ddp."
                )
