"""Initial weights drawn one module at a time, for models that no rank can hold in full.

The model of a task that implements ``init_module`` is built on the meta device, without memory,
and each of its modules is seeded by its own name. So the weights do not depend on the rank that
draws them or on the order, and a rank keeps its shard of a module before it draws the next one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.data.order import dataset_seed, initial_seed, module_seed
from train.distributed.randomness import seed_everything
from train.distributed.shard import Shard
from train.exits import RunError, UsageError, first_line
from train.strategies.parameters import to_fp32
from train.tasks.base import Task
from train.tasks.checked import model_of


class BuiltModel(NamedTuple):
    """A task's model."""

    model: nn.Module
    """With its weights, or on the meta device."""
    initial: Initial | None
    """Draws the weights of a model on the meta device; None for one that has them."""
    converted: list[str]
    """Names of the tensors that were converted to fp32."""


def build_model(task: Task, seed: int) -> BuiltModel:
    """The task's model, with trainable parameters in fp32."""
    precision = task.config.precision
    if type(task).init_module is Task.init_module:
        model = model_of(task)
        return BuiltModel(model, None, to_fp32(model, precision))
    with torch.device("meta"):
        model = model_of(task)
    on_device = [name for name, tensor in _tensors(model).items() if not tensor.is_meta]
    if on_device:
        raise UsageError(
            f"The task {type(task).__name__} implements init_module, so its build_model must not "
            f"assign values to tensors, but {on_device[0]} has values; set them in init_module."
        )
    converted = to_fp32(model, precision)
    return BuiltModel(model, Initial(model, task, seed), converted)


def build_full_model(
    task: Task, seed: int, shapes: Mapping[str, Sequence[int]] | None
) -> nn.Module:
    """The task's model with the initial values that a run of this seed starts from, on the CPU.
    What a checkpoint does not hold, such as a non-persistent buffer, keeps them.

    A run loads its training data before it builds the model, which may depend on what was found in
    it, such as the number of classes. So the data is loaded where the model cannot be built without
    it, or has not the ``shapes`` of the checkpoint's tensors, by name; never where they are None.
    """
    if shapes is None:
        return _full_model(task, seed)
    failed: Exception | None = None
    model: nn.Module | None = None
    try:
        model = _full_model(task, seed)
    except RunError:
        raise
    except Exception as error:
        failed = error
    if model is not None and all(
        tuple(shapes.get(name, parameter.shape)) == tuple(parameter.shape)
        for name, parameter in model.named_parameters()
    ):
        return model
    seed_everything(dataset_seed(seed))
    try:
        task.train_dataset()
    except Exception as error:
        if model is not None:
            return model  # whose shapes the caller reports
        assert failed is not None
        raise UsageError(
            f"build_model() failed without the training data ({first_line(failed)}), and "
            f"train_dataset() failed as well ({first_line(error)}); give the data, or let "
            "build_model() depend on the config alone."
        ) from failed
    return _full_model(task, seed)


def _full_model(task: Task, seed: int) -> nn.Module:
    seed_everything(initial_seed(seed))
    try:
        model, initial, _ = build_model(task, seed)
        if initial:
            initial.fill(model, torch.device("cpu"))
    except (RuntimeError, TypeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        # torch has no class for a size that no tensor can have.
        raise UsageError(
            f"build_model() of {type(task).__name__} needs a tensor that is too large for torch "
            f"({first_line(error)}); correct the sizes in the config's section model."
        ) from error
    return model


class Initial:
    """Draws the values of a model that is on the meta device."""

    def __init__(self, model: nn.Module, task: Task, seed: int) -> None:
        # Full shapes without memory; they stay full when the model is sharded.
        self._model, self._task, self._seed = copy.deepcopy(model), task, seed

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Each module that has parameters or buffers of its own, with their values in host memory.
        Its submodules stay on the meta device."""
        for name, module in self._model.named_modules():
            own = {**module._parameters, **module._buffers}
            if all(tensor is None for tensor in own.values()):
                continue
            drawn = copy.deepcopy(module).to_empty(device="cpu", recurse=False)
            seed_everything(module_seed(self._seed, name))
            with torch.no_grad():
                self._task.init_module(drawn, name)
            yield name, drawn

    def fill(
        self, model: nn.Module, device: torch.device, shards_on: torch.device | None = None
    ) -> None:
        """Allocates a model on the meta device on ``device``, its sharded parameters on
        ``shards_on`` (default: there, too), and gives each tensor, or this rank's shard of it, its
        values. A tensor with several names gets those drawn for the first."""
        materialize(model, device, shards_on or device)
        targets = {name: Shard.of(tensor) for name, tensor in _tensors(model).items()}
        for name, drawn in self.modules():
            for key, value in _own_tensors(drawn):
                target = targets.get(f"{name}.{key}" if name else key)
                for (offsets, sizes), view in target.chunks() if target else ():
                    window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                    view.copy_(value[window])


def materialize(model: nn.Module, device: torch.device, shards_on: torch.device) -> None:
    """Allocates all tensors of a model on the meta device, without values. Unlike
    ``nn.Module.to_empty``, shared tensors stay shared."""
    from torch.distributed.tensor import DTensor

    made: dict[int, Tensor] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                made.setdefault(
                    id(parameter),
                    nn.Parameter(
                        torch.empty_like(
                            parameter,
                            device=shards_on if isinstance(parameter, DTensor) else device,
                            requires_grad=False,
                        ),
                        requires_grad=parameter.requires_grad,
                    ),
                )
                module._parameters[key] = made[id(parameter)]  # type: ignore[assignment]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                made.setdefault(id(buffer), torch.empty_like(buffer, device=device))
                module._buffers[key] = made[id(buffer)]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in {**module._parameters, **module._buffers}.items():
        if tensor is not None:
            yield key, tensor.detach()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, by the first of their names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
