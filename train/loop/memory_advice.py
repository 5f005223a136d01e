"""What to change when memory runs out, in numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.config.load import LoadedConfig
from train.data.plan import BatchPlan
from train.distributed.shard import Shard
from train.exits import OutOfMemoryError
from train.files import physical_memory
from train.process.diagnose import as_run_error, is_out_of_memory
from train.setup.build import RunData, TrainableModel
from train.strategies.base import Strategy
from train.tasks.base import Task
from train.tasks.checked import loss_of

_log = logging.getLogger("train")
_USABLE = 0.9
"""Of a device's memory; the rest is for fragmentation, libraries and temporary tensors."""
_UNITS = (("GiB", 30), ("MiB", 20), ("KiB", 10))


class Activations(NamedTuple):
    """What the backward pass needs of each sample of a micro-batch, in bytes."""

    per_sample: float
    recomputed: float
    """The part that activation checkpointing would not keep; 0 where there are no blocks, or where
    it is in use."""


class Needs(NamedTuple):
    """What a rank keeps in memory, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    shardable: int
    """What of these all ranks have alike."""
    activations: Activations | None
    """None where they could not be measured."""
    capacity: int | None
    """The memory of the device, or of the host."""
    micro_batch_size: int
    world_size: int

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer


@contextmanager
def advising(
    loaded: LoadedConfig, task: Task, data: RunData, plan: BatchPlan, model: TrainableModel
) -> Iterator[None]:
    """Adds advice in numbers to an error of the body that says that memory ran out. Not
    collective."""
    try:
        yield
    except Exception as error:
        known = as_run_error(error) if is_out_of_memory(error) else None
        if not isinstance(known, OutOfMemoryError):  # or other processes use the GPU
            raise
        _log.error("out of memory", exc_info=error)
        try:
            needs = _needs(loaded, task, data, plan, model.strategy)
        except Exception:  # an error in the advice must not hide the reason
            _log.warning("what the run needs of memory could not be measured", exc_info=True)
            raise known from error
        raise OutOfMemoryError(f"{known} {advice(needs)}") from error


def advice(needs: Needs) -> str:
    """Sentences on what each remedy saves."""
    kept = (
        f"weights {size(needs.weights)}, gradients {size(needs.gradients)}, optimiser state "
        f"{size(needs.optimizer)}"
    )
    words = [f"Each rank has {kept}"]
    activations, batch = needs.activations, needs.micro_batch_size
    if activations:
        words[0] += (
            f", and about {size(batch * activations.per_sample)} of activations for a micro-batch "
            f"of {batch} ({size(activations.per_sample)} per sample)"
        )
    if needs.capacity:
        words[0] += f"; there are {size(needs.capacity)}"
    words += list(_remedies(needs))
    return ". ".join(words) + "."


def _remedies(needs: Needs) -> Iterator[str]:
    activations, batch = needs.activations, needs.micro_batch_size
    if activations and batch > 1:
        smaller = batch // 2
        if needs.capacity and activations.per_sample:
            room = _USABLE * needs.capacity - needs.fixed
            smaller = max(1, min(smaller, int(room / activations.per_sample)))
        total = needs.fixed + smaller * activations.per_sample
        yield f"batch.micro_batch_size={smaller} needs about {size(total)}"
    elif batch > 1:
        yield f"Try batch.micro_batch_size={batch // 2}"
    if activations and activations.recomputed >= 1:
        saved = batch * activations.recomputed
        yield f"activation_checkpointing=true saves about {size(saved)}"
    if needs.shardable:
        ranks = max(needs.world_size, 2)
        saved = needs.shardable * (ranks - 1) / ranks
        yield f"strategy=fsdp2 on {ranks} ranks saves about {size(saved)}"


def size(number: float) -> str:
    """A number of bytes in words."""
    for unit, bits in _UNITS:
        if number >= 2**bits:
            return f"{number / 2**bits:.3g} {unit}"
    return f"{number:.0f} bytes"


def _needs(
    loaded: LoadedConfig, task: Task, data: RunData, plan: BatchPlan, strategy: Strategy
) -> Needs:
    checkpoints = loaded.config.activation_checkpointing
    blocks = [] if checkpoints else strategy.setup.blocks
    shards = strategy.weights().values()
    weights = sum(_bytes(shard.local) for shard in shards)
    whole = 4 * sum(shard.shape.numel() for shard in shards)
    optimizer = _optimizer_bytes(strategy, weights)
    sharded = strategy.shards_parameters
    gradients = weights if sharded else whole
    alike = 0 if sharded else whole + gradients
    if not sharded:
        # ZeRO 1 and 2 have shards of the optimiser's weights beside the whole model.
        alike += optimizer if weights >= whole else 0
        weights = max(weights, whole)
    return Needs(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        shardable=alike,
        activations=None if sharded else _activations(task, data.train, strategy, blocks),
        capacity=_capacity(strategy.engine.device),
        micro_batch_size=plan.largest_micro_batch,
        world_size=strategy.engine.world_size,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _optimizer_bytes(strategy: Strategy, weights: int) -> int:
    """Of the optimiser's state; an estimate before its first step."""
    try:
        states = strategy.optimizer_state().values()
        kept = [v.local for state in states for v in state.values() if isinstance(v, Shard)]
    except KeyError:  # FSDP2 has gathered weights in the place of those that have the state
        values = [v for state in strategy.optimizer.state.values() for v in state.values()]
        kept = [Shard.of(v).local for v in values if isinstance(v, Tensor)]
    if kept:
        return sum(map(_bytes, kept))
    group = strategy.optimizer.param_groups[0]
    return weights * (2 if "betas" in group else 1 if group.get("momentum") else 0)


def _capacity(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return physical_memory()
    except (OSError, ValueError):
        return None


def _activations(
    task: Task, data: Any, strategy: Strategy, blocks: list[nn.Module]
) -> Activations | None:
    """Measured by forward passes over a few samples, without another rank. ``blocks``: those that
    activation checkpointing would recompute."""

    def measure(samples: int) -> tuple[int, int]:
        batch = strategy.engine.to_device(
            task.collate([data[i % len(data)] for i in range(samples)])
        )
        with count_saved(strategy.bare_model, blocks) as saved:
            strategy.call(partial(loss_of, task, batch=batch))
        return saved.total(), saved.recomputed()

    try:
        with torch.enable_grad():
            two, four = measure(2), measure(4)
    except Exception:
        _log.warning("the activations could not be measured", exc_info=True)
        return None
    return Activations(*((b - a) / 2 if b > a else 0.0 for a, b in zip(two, four, strict=True)))


class Saved:
    """Counts the tensors that autograd keeps for the backward pass."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._sizes: dict[int, int] = {}
        self._of_block: dict[int, dict[int, int]] = {}
        self._inputs = 0
        self._block: int | None = None

    def keep(self, tensor: Tensor) -> Tensor:
        """Called for each tensor that is saved."""
        storage = tensor.untyped_storage()
        place, number = storage.data_ptr(), storage.nbytes()
        if place not in self._known:
            self._sizes[place] = number
            if self._block is not None:
                self._of_block.setdefault(self._block, {})[place] = number
        return tensor

    def enter(self, block: int, inputs: Any) -> None:
        """A block is called with these inputs, which checkpointing keeps."""
        self._block = block
        self._inputs += sum(_bytes(value) for value in inputs if isinstance(value, Tensor))

    def leave(self) -> None:
        """The block has returned."""
        self._block = None

    def total(self) -> int:
        """Bytes."""
        return sum(self._sizes.values())

    def recomputed(self) -> int:
        """Bytes that checkpointing would not keep: those of all blocks, but for the inputs and for
        the block that is being recomputed."""
        sizes = [sum(of.values()) for of in self._of_block.values()]
        return max(0, sum(sizes) - max(sizes, default=0) - self._inputs)


@contextmanager
def count_saved(model: nn.Module, blocks: list[nn.Module]) -> Iterator[Saved]:
    """Counts what autograd saves of the model's calls in the body, also of each of its blocks."""
    saved = Saved([*model.parameters(), *model.buffers()])
    hooks = []

    def entering(number: int) -> Callable[..., None]:
        return lambda _module, inputs: saved.enter(number, inputs)

    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(entering(number)))
        hooks.append(block.register_forward_hook(lambda *_: saved.leave()))
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            yield saved
    finally:
        for hook in hooks:
            hook.remove()
