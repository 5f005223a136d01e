"""Trainable parameters that get no gradient in a step, on some ranks or on all: experts, branches
that depend on the data, layers that are dropped at random.

One process leaves such a parameter as it is: its gradient is None, so the optimiser applies neither
momentum nor weight decay. It counts as used where any micro-batch of the step uses it, on any rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.distributed.collectives import Collectives


def unused_everywhere(collectives: Collectives, unused: Iterable[str]) -> set[str]:
    """The names that every rank gives; collective. One small exchange where no rank gives any."""
    own = set(unused)
    if not any(collectives.all_reduce_ints([len(own)])):
        return set()
    return set.intersection(*map(set, collectives.all_gather_object(list(own))))


def accumulate_zeros(parameters: Sequence[nn.Parameter]) -> None:
    """Adds zeros to the gradients, as a backward pass that reaches the parameters would do: with
    the hooks by which DistributedDataParallel learns of a gradient."""
    if not parameters:
        return
    # A parameter that was frozen after the start is expected as well.
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    outputs = [parameter.view_as(parameter) for parameter in parameters]
    torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    for parameter in frozen:
        parameter.requires_grad_(False)


def autograd_nodes(loss: Tensor) -> Iterator[Any]:
    """All nodes of the loss's autograd graph."""
    seen = {loss.grad_fn}
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                stack.append(following)


def not_reached(loss: Tensor, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """The names of the parameters to which no path of the loss's autograd graph leads. Empty where
    the graph does not show all of them: within a reentrant checkpoint of activations."""
    reached: set[int] = set()
    for node in autograd_nodes(loss):
        variable = getattr(node, "variable", None)
        if variable is not None:
            reached.add(id(variable))
        elif node.name() == "CheckpointFunctionBackward":
            return []
    return [name for name, parameter in parameters if id(parameter) not in reached]
