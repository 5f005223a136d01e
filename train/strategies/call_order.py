"""Checks that all ranks call the modules that gather their parameters alike.

Each such call is an exchange between ranks: where one rank calls a module that another does not, as
with experts that are chosen by the data, both would wait until the time limit, or mix up values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

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
        if len(set(calls)) == 1:
            return
        first, other = 0, next(rank for rank, call in enumerate(calls) if call != calls[0])
        told = ["no module" if calls[r] == _END else names[calls[r]] for r in (first, other)]
        raise UsageError(
            f"Rank {first} calls {told[0]} where rank {other} calls {told[1]}, but the strategy "
            "gathers the parameters of these modules at each call, for which all ranks must call "
            "them in the same order; with fsdp2, return modules around them that each rank calls "
            "in the task's blocks(), or use strategy=ddp."
        )

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
