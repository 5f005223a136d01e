"""Tries an optimiser on a small example, before it gets the model.

What an optimiser is called says little about what it does: some keep state that a checkpoint cannot
hold, others use norms or factors of whole parameters, which a rank with a shard of them does not
have. So the example is updated as a whole and in shards, and the results are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from train.exits import UsageError, first_line
from train.optim.optimizer import set_learning_rate

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

KNOWN = {"adamw", "adam", "sgd", "rmsprop", "nadam", "radam"}
"""Names of optimisers of torch that work element by element and keep nothing else."""
_STEPS, _LR, _TOLERANCE = 3, 0.05, 1e-3
_OTHER_SHAPE = "it keeps state that has not the shape of the parameter"
_JSON = (bool, int, float, str, type(None))

Build = Callable[[nn.Module], Optimizer]


class Example(nn.Module):
    """Parameters like those of ``model``: one of each number of dimensions."""

    def __init__(self, model: nn.Module, device: torch.device, ranks: int) -> None:
        super().__init__()
        trained = [p for p in model.parameters() if p.requires_grad and p.dim()]
        generator = torch.Generator().manual_seed(0)
        self.tensors = nn.ParameterDict()
        self.gradients: list[list[Tensor]] = [[] for _ in range(_STEPS)]
        for dimensions in sorted({p.dim() for p in trained}):
            shape = (2 * ranks + 1, 3, 2, 2)[:dimensions] + (2,) * (dimensions - 4)
            start = torch.randn(shape, generator=generator).to(device)
            self.tensors[f"weight{dimensions}"] = nn.Parameter(start)
            for each in self.gradients:
                each.append(torch.randn(shape, generator=generator).to(device))


def update(build: Build, module: nn.Module, gradients: Sequence[Sequence[Tensor]]) -> Optimizer:
    """Takes a step of the optimiser with each row of gradients."""
    optimizer = build(module)
    parameters = list(module.parameters())
    for row in gradients:
        set_learning_rate(optimizer, _LR)
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return optimizer


class Updates(NamedTuple):
    """The example's values before and after its updates as a whole."""

    start: list[Tensor]
    end: list[Tensor]
    elementwise: bool
    """Whether the state consists of tensors like the parameters, and of numbers."""


def try_whole(build: Build, example: Example, name: str) -> Updates | None:
    """Updates the example in place. None where the optimiser does not work on it. Raises UsageError
    for state that a checkpoint cannot hold, and for an optimiser of torch that fails."""
    start = [parameter.detach().clone() for parameter in example.parameters()]
    cls: type[Optimizer] | None = None
    try:
        made = build(example)
        cls, before = type(made), _kept_outside(made)
        optimizer = update(build, example, example.gradients)
    except Exception as error:
        if not isinstance(error, TypeError) or "closure" not in str(error):
            if cls is None or not cls.__module__.startswith("torch.optim"):
                return None  # it may support other shapes only
            raise UsageError(
                f"optim.use is {name!r}, whose step fails ({first_line(error)}); correct "
                "optim.options, or use another optimiser."
            ) from error
        raise UsageError(
            f"optim.use is {name!r}, whose step() needs a closure ({first_line(error)}), which "
            "computes the loss again; use an optimiser that takes the gradients as they are."
        ) from error
    _check_state(optimizer, before, name)
    elementwise = all(
        value.shape in (parameter.shape, ())
        for parameter in example.parameters()
        for value in optimizer.state[parameter].values()
        if isinstance(value, Tensor)
    )
    return Updates(start, [p.detach().clone() for p in example.parameters()], elementwise)


def _check_state(optimizer: Optimizer, before: dict[str, Any], name: str) -> None:
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for owner, entries in optimizer.state.items():
        if id(owner) not in parameters:
            raise _unsaved(name, f"state of its own ({owner!r:.50})")
        for entry, value in entries.items():
            if not isinstance(value, (Tensor, *_JSON)):
                raise _unsaved(name, f"state as {type(value).__name__} ({entry!r:.50})")
    for key, value in _kept_outside(optimizer).items():
        if key not in before or not _equal(before[key], value):
            raise _unsaved(name, f"state in {key}")


def _kept_outside(optimizer: Optimizer) -> dict[str, Any]:
    """The numbers and tensors among its attributes, except torch's own, and the tensors in its
    parameter groups."""
    found = {
        f"its attribute {key}": value
        for key, value in vars(optimizer).items()
        if not key.startswith("_") and isinstance(value, (Tensor, int, float))
    }
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, Tensor) and key != "lr":  # the schedule sets it
                found[f"its parameter groups ({key})"] = value
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in found.items()}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _unsaved(name: str, what: str) -> UsageError:
    return UsageError(
        f"optim.use is {name!r}, which keeps {what}, so a checkpoint could not hold it; let it "
        "keep tensors and numbers in state[parameter], or numbers in its parameter groups."
    )


def check_flat(build: Build, example: Example, whole: Updates, ranks: int) -> str | None:
    """Why the optimiser does not make the same updates where each rank has an equal part of all
    parameters in one flat tensor (ZeRO); None where it does."""
    if not whole.elementwise:
        return _OTHER_SHAPE
    expected = _joined(whole.end)
    size = -(-expected.numel() // ranks)
    found = []
    for rank in range(ranks):
        part = slice(rank * size, min((rank + 1) * size, expected.numel()))
        if part.start >= part.stop:
            continue
        module = nn.Module()
        module.weight = nn.Parameter(_joined(whole.start)[part].clone())
        rows = [[_joined(row)[part]] for row in example.gradients]
        try:
            update(build, module, rows)
        except Exception as error:  # any: it is told
            return first_line(error)
        found.append(module.weight.detach())
    return difference(whole, expected, torch.cat(found))


def check_sharded(build: Build, example: Example, whole: Updates, mesh: DeviceMesh) -> str | None:
    """As ``check_flat``, for parameters that are sharded in the first dimension (FSDP2);
    collective."""
    if not whole.elementwise:
        return _OTHER_SHAPE
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]

    def place(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    module = nn.ParameterDict(
        {f"weight{n}": nn.Parameter(place(tensor)) for n, tensor in enumerate(whole.start)}
    )
    try:
        rows = [[place(gradient) for gradient in row] for row in example.gradients]
        update(build, module, rows)
    except Exception as error:  # any: it is told
        return first_line(error)
    expected = _joined([place(tensor).to_local() for tensor in whole.end])
    return difference(whole, expected, _joined([p.to_local() for p in module.values()]))


def difference(whole: Updates, expected: Tensor, found: Tensor) -> str | None:
    """How ``found`` differs from ``expected`` by more than rounding."""
    largest = float((_joined(whole.end) - _joined(whole.start)).abs().max())
    by = float((found - expected).abs().max()) if found.numel() else 0.0
    if by <= _TOLERANCE * largest:
        return None
    return f"in an example its update differs by {100 * by / max(largest, 1e-30):.0f} %"


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
