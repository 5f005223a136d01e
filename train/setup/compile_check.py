"""Checks that a compiled model computes the same gradients as the model as written.

torch.compile does not always do so: in torch 2.13 on the CPU, convolutions before a max-pooling can
silently get gradients of zero. The result of a run must not depend on compilation, so the first
micro-batch is computed both ways before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.distributed.collectives import Collectives
from train.distributed.randomness import seed_everything
from train.exits import UsageError
from train.strategies.model_call import CallModel
from train.strategies.parameters import trainable_parameters
from train.tasks.base import Task
from train.tasks.checked import loss_of
from train.tasks.modes import evaluating

# The largest allowed difference of a gradient, relative to the largest gradient, by precision: far
# above the effect of reordered arithmetic, far below that of a wrong kernel.
_TOLERANCE = {"fp32": 0.01, "bf16": 0.2, "fp16": 0.2}


def check_compiled(
    task: Task,
    call: CallModel,
    model: nn.Module,
    batch: Any,
    precision: str,
    collectives: Collectives,
) -> None:
    """Raises UsageError on all ranks where the compiled model's gradients differ from the
    uncompiled ones on any rank; collective.

    ``call`` gives the loss the bare ``model``, which is compiled in place; ``batch`` is on its
    device. Where the loss depends on random numbers (dropout), both are computed in evaluation
    mode, because compiled code draws other numbers. Leaves no gradients.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    with _as_written(model):
        written = _gradients(task, call, model, batch, seed=0)
        again = _gradients(task, call, model, batch, seed=1)
        is_random = not all(torch.equal(written[name], again[name]) for name in written)
    random_anywhere = any(collectives.all_reduce_ints([is_random]))
    with evaluating(model) if random_anywhere else nullcontext():
        if random_anywhere:
            with _as_written(model):
                written = _gradients(task, call, model, batch, seed=0)
        compiled = _gradients(task, call, model, batch, seed=0)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)  # the passes have updated a BatchNorm's statistics
    sizes = [float(gradient.abs().max()) for gradient in written.values() if gradient.numel()]
    by_rank = collectives.all_gather_floats([max(sizes, default=0.0)])
    largest = max(size for [size] in by_rank)
    wrong = _first_difference(written, compiled, _TOLERANCE[precision] * largest)
    found = next((each for each in collectives.all_gather_object(wrong) if each), None)
    if found:
        name, difference = found
        raise UsageError(
            f"compile is true, but the compiled model computes a different gradient of {name} "
            f"than the uncompiled one (they differ by {difference:.3g}, where the largest "
            f"gradient is {largest:.3g}), which is a fault of torch.compile "
            f"{torch.__version__} with this model; set compile=false."
        )


def _first_difference(
    written: dict[str, Tensor], compiled: dict[str, Tensor], tolerance: float
) -> tuple[str, float] | None:
    """The first gradient that differs by more than ``tolerance``, and by how much."""
    for name, expected in written.items():
        if not expected.numel():  # it belongs to other ranks
            continue
        actual = compiled.get(name, torch.zeros_like(expected))
        difference = float((actual - expected).abs().max())
        if not difference <= tolerance:
            return name, difference
    return None


def _gradients(
    task: Task, call: CallModel, model: nn.Module, batch: Any, seed: int
) -> dict[str, Tensor]:
    """The gradients of one batch's loss by parameter name, as float32. Of a sharded model, this
    rank's shards of the gradients averaged over the ranks."""
    parameters = trainable_parameters(model)
    first = next(iter(parameters.values()))
    seed_everything(seed, first.device)
    loss = call(partial(loss_of, task, batch=batch))
    if isinstance(first, DTensor):
        # torch.autograd.grad cannot reach them: the forward pass uses gathered copies.
        loss.sum.backward()
        found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        for parameter in parameters.values():
            parameter.grad = None
        return {name: gradient.to_local().float() for name, gradient in found.items()}  # type: ignore[attr-defined]
    gradients = torch.autograd.grad(loss.sum, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return {name: gradient.float() for name, gradient in pairs if gradient is not None}


@contextmanager
def _as_written(model: nn.Module) -> Iterator[None]:
    """Disables the compiled form, which ``nn.Module.compile`` stores in this attribute."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled
