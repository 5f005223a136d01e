"""The base class of tasks: model, data, loss and metrics of a run.

A task does not depend on ranks, devices, micro-batches or checkpoints. Subclass :class:`Task` in
any module and name the class in the config: ``task.use=my_project.task:MyTask``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from train.exits import UsageError
from train.section import Section

if TYPE_CHECKING:
    import torch
    from torch import nn


class Ratio(NamedTuple):
    """A sum and the count that divides it.

    Sums and counts are added over micro-batches and ranks before the division; means cannot be.
    """

    sum: Any
    """A scalar tensor; a loss has its autograd graph."""
    count: Any
    """A scalar tensor or a number."""


class Task:
    """Base class of all tasks. Implement ``build_model``, ``train_dataset`` and ``loss``.

    ``self.config`` is the validated config; its sections ``task``, ``model`` and ``data`` are
    validated by the nested classes ``Options``, ``Model`` and ``Data``. Every rank calls the same
    methods in the same order.
    """

    class Options(Section):
        """The fields of the config's ``task`` section besides ``use``."""

    class Model(Section):
        """The config's ``model`` section."""

    class Data(Section):
        """The config's ``data`` section."""

    unit: ClassVar[str] = "samples"
    """What ``count`` counts, in the plural; unless "samples", its throughput is logged as well."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def build_model(self) -> nn.Module:
        """The model, with initial weights drawn from torch's global generator (seeded by the
        caller).

        Set ``requires_grad`` of every parameter here, and call ``eval()`` on the modules that stay
        in evaluation mode throughout the training; a model that is in evaluation mode as a whole
        is trained as a whole.
        """
        raise NotImplementedError

    def init_module(self, module: nn.Module, name: str) -> None:
        """Initialises the parameters and buffers of one module in place, without its submodules.

        torch's global generator is seeded by the run's seed and ``name``, the module's fully
        qualified name. Override it for models that do not fit on one machine: ``build_model`` then
        runs on the meta device, and each rank keeps only its shards. The default calls
        ``reset_parameters``; raises UsageError if a module has none.
        """
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise UsageError(
                f"The task's init_module does not initialise the "
                f"{type(module).__name__} {name or '(the model itself)'!r}, which has parameters "
                "or buffers but no reset_parameters(); handle it in init_module."
            )
        reset()

    def train_dataset(self) -> Any:
        """A map-style ``torch.utils.data.Dataset``: ``__len__`` and ``__getitem__(index)``.

        Before each call, torch, numpy and ``random`` are seeded by (run seed, epoch, index), for
        random augmentation. A dataset that draws no random numbers may set the attribute
        ``deterministic = True`` to skip the seeding.
        """
        raise NotImplementedError

    def eval_dataset(self) -> Any | None:
        """The evaluation data, like ``train_dataset``; None without evaluation."""
        return None

    def collate(self, samples: list[Any]) -> Any:
        """Collates samples into a batch: tensors in (nested) tuples, lists or dicts."""
        from torch.utils.data import default_collate

        return default_collate(samples)

    def count(self, batch: Any) -> int:
        """The count of the loss of this batch; by default the number of samples.

        Called before the batch is moved to the device and before its forward pass, because the
        gradient of the first micro-batch already needs the global count. Must equal
        ``loss(...).count``.
        """
        return batch_size(batch)

    def loss(self, model: nn.Module, batch: Any) -> Ratio:
        """The loss summed (not averaged) over the batch, and the count of that sum."""
        raise NotImplementedError

    def metrics(self) -> dict[str, Any]:
        """torchmetrics objects by name, for metrics that are not a ratio of two sums. Each element
        of a value with several is a metric: ``name/0``, ``name/key``."""
        return {}

    def measure(self, model: nn.Module, batch: Any) -> Mapping[str, Ratio | tuple[Any, ...]]:
        """Metrics of one evaluation batch, by name: a :class:`Ratio`, or, for a name in
        ``metrics()``, the tuple of arguments of that object's ``update``. No metric may have the
        name ``checkpoint``."""
        return {"loss": self.loss(model, batch)}

    def derive(self, totals: Mapping[str, Ratio]) -> dict[str, float]:
        """Metrics derived from the sums and counts (floats) over all evaluation data, by the names
        that ``measure`` gave them."""
        return {}

    def report(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Texts (str) and images (float tensors of shape (3, H, W) in [0, 1]) to log after an
        evaluation, by name. Called on every rank, with the model in evaluation mode; rank 0's
        result is logged."""
        return {}

    def check_report(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """What is called before the first step, to find mistakes in ``report``; the result is
        dropped. Override it if ``report`` is slow, such as with a shorter text to generate."""
        return self.report(model, device)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The modules that fsdp2 shards and gathers one at a time, such as a transformer's layers.

        Empty: the members of the model's ``nn.ModuleList``s. Each must be used through its
        ``forward``.
        """
        return []

    def facts(self) -> dict[str, float]:
        """Numbers on the data to log at the start, such as a baseline's loss."""
        return {}

    def example_inputs(self) -> tuple[Any, ...]:
        """Positional arguments of the model's ``forward`` (CPU tensors, batch size 2), for
        export."""
        raise NotImplementedError

    def flops_per_sample(self) -> float | None:
        """FLOPs of the forward and backward pass of one sample, for the model FLOPs utilisation;
        None if unknown."""
        return None


def batch_size(batch: Any) -> int:
    """The first dimension of the first tensor in a batch. Raises TypeError without a tensor."""
    size = _first_dimension(batch)
    if size is None:
        raise TypeError(
            f"The batch of type {type(batch).__name__} holds no tensor, so its samples cannot be "
            "counted; override the task's count(batch)."
        )
    return size


def _first_dimension(batch: Any) -> int | None:
    shape = getattr(batch, "shape", None)
    if shape is not None and len(shape):
        return int(shape[0])
    values = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(values, (list, tuple)) or isinstance(batch, Mapping):
        for value in values:
            size = _first_dimension(value)
            if size is not None:
                return size
    return None
