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
        calls = [[int(call)] for [call] in collectives.all_gather_floats([index])]
        if difference := _difference(dict(enumerate(calls)), names):
            raise UsageError(difference)

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
    """The calls on this rank since ``clear``, and the ends of the forward passes of ``root``.
    Compiled modules are not recorded."""

    def __init__(
        self, modules: Mapping[str, nn.Module], root: nn.Module, collectives: Collectives
    ) -> None:
        self.names, self._collectives = list(modules), collectives
        self._cleared, self._calls = 0, array("l")
        for index, module in enumerate(modules.values()):
            # Before the module gathers: this rank may wait there for ever.
            module.register_forward_pre_hook(partial(self._record, index), prepend=True)
        root.register_forward_hook(partial(self._record, _END))

    def _record(self, index: int, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._calls.append(index)

    def clear(self) -> None:
        """Starts anew; all ranks do it at the same point."""
        self._cleared += 1
        del self._calls[:]

    def numbers(self) -> list[int]:
        """Numbers of this rank. Their sums over all ranks show whether all made the same calls."""
        digest = zlib.crc32(self._calls.tobytes()) >> 8  # 24 bits: sums of squares do not overflow
        return [digest, digest * digest]

    def check(self, sums: Sequence[int]) -> None:
        """Raises UsageError on all ranks where the sums of ``numbers`` differ between ranks;
        collective."""
        total, squares = sums
        if total * total == self._collectives.world_size * squares:
            return
        by_rank = self._collectives.all_gather_object(self._calls.tolist())
        if difference := _difference(dict(enumerate(by_rank)), self.names):
            raise UsageError(difference)

    def so_far(self) -> list[int]:
        """How often the record was cleared, then the calls."""
        return [self._cleared, *self._calls]

    def fault(self, by_rank: Mapping[int, Sequence[int]]) -> str | None:
        """The sentence for ranks that made other calls since they cleared their records equally
        often. A rank that has made fewer calls, but is still in its forward pass, may be slow."""
        known = range(_END, len(self.names))
        whole = all(
            calls and all(call in known for call in calls[1:]) for calls in by_rank.values()
        )
        if not whole or len({calls[0] for calls in by_rank.values()}) != 1:
            return None
        return _difference({rank: calls[1:] for rank, calls in by_rank.items()}, self.names)


def _difference(by_rank: Mapping[int, Sequence[int]], names: Sequence[str]) -> str | None:
    """A sentence about the first call in which a rank differs from the first of the ranks; None
    where each makes the beginning of the other's calls."""
    (first, expected), *others = by_rank.items()
    for rank, calls in others:
        for pair in zip(expected, calls, strict=False):
            if pair[0] != pair[1]:
                own, other = ("no module" if call == _END else names[call] for call in pair)
                return (
                    f"Rank {first} calls {own} where rank {rank} calls {other}, but the strategy "
                    "gathers the parameters of these modules at each call, for which all ranks "
                    "must call them in the same order; with fsdp2, return modules around them that "
                    "each rank calls in the task's blocks(), or use strategy=ddp."
                )
    return None
