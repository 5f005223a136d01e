"""What a task is: the model, the data, the loss and the metrics of a training.

A task says *what* is computed and knows nothing of ranks, devices, micro-batches or checkpoints.
Subclass :class:`Task` anywhere and name the class in the config:
``task.use=my_project.task:MyTask``.
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
    """A sum and the count it is to be divided by, kept apart.

    Sums and counts add up exactly over micro-batches and ranks; means do not. ``sum`` is a
    scalar tensor (with its graph, where it is a loss) and ``count`` a scalar tensor or a number.
    """

    sum: Any
    count: Any


class Task:
    """Base class of all tasks. Implement ``build_model``, ``train_dataset`` and ``loss``.

    ``self.config`` is the whole validated config; the task's own parts of it are
    ``self.config.task``, ``self.config.model`` and ``self.config.data``, validated by the
    nested classes ``Options``, ``Model`` and ``Data``. All methods are called on every rank alike.
    """

    class Options(Section):
        """The fields of the config's ``task`` section besides ``use``."""

    class Model(Section):
        """The config's ``model`` section."""

    class Data(Section):
        """The config's ``data`` section."""

    unit: ClassVar[str] = "samples"
    """What ``count`` counts, in the plural; a second throughput is logged when not "samples"."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def build_model(self) -> nn.Module:
        """The model, with its initial weights drawn from torch's global random state (seeded by
        the caller). Give every parameter its requires_grad here."""
        raise NotImplementedError

    def init_module(self, module: nn.Module, name: str) -> None:
        """Gives the parameters and buffers of one module of the model, not of those inside it,
        their initial values; torch's random state is seeded by the run's seed and ``name``.

        Implement it for models that are too large for one machine: the model is then built on
        the meta device, so that ``build_model`` takes no memory, and each rank keeps its share
        only. This base does as torch's own modules do.
        """
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise UsageError(
                f"The task's init_module does not know how to initialise the "
                f"{type(module).__name__} {name or '(the model itself)'!r}, which has parameters "
                "or buffers of its own but no reset_parameters(); handle it there."
            )
        reset()

    def train_dataset(self) -> Any:
        """A map-style ``torch.utils.data.Dataset``: ``__len__`` and ``__getitem__(index)``.

        Random augmentation in ``__getitem__`` needs no care: torch, numpy and ``random`` are
        seeded by (run seed, epoch, index) before each call. A dataset that draws no random
        numbers may set the attribute ``deterministic = True`` to save that work.
        """
        raise NotImplementedError

    def eval_dataset(self) -> Any | None:
        """Like ``train_dataset``, for evaluation; None where there is none."""
        return None

    def collate(self, samples: list[Any]) -> Any:
        """Joins samples into a batch: tensors in (nested) tuples, lists or dicts."""
        from torch.utils.data import default_collate

        return default_collate(samples)

    def count(self, batch: Any) -> int:
        """How many units the loss of this batch will be divided by; the default counts samples.

        Called on the host, before the batch is moved to a device and before its forward pass, so
        that the gradient is right from the first micro-batch on. Must equal ``loss(...).count``.
        """
        return batch_size(batch)

    def loss(self, model: nn.Module, batch: Any) -> Ratio:
        """The loss summed (not averaged) over the batch, and the number of units in that sum."""
        raise NotImplementedError

    def metrics(self) -> dict[str, Any]:
        """torchmetrics objects by name, for metrics that are no ratio of two sums."""
        return {}

    def measure(self, model: nn.Module, batch: Any) -> Mapping[str, Ratio | tuple[Any, ...]]:
        """Metrics of one evaluation batch: for each name a :class:`Ratio`, or, where the name is
        one of ``metrics()``, the tuple of arguments for that object's ``update``."""
        return {"loss": self.loss(model, batch)}

    def derive(self, totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Further metrics from the (sum, count) totals over the whole evaluation data."""
        return {}

    def report(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Things to look at after an evaluation: name to text (str) or to image (float tensor of
        shape (3, H, W) in [0, 1]). Called on every rank alike; rank 0's is shown."""
        return {}

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Modules that the strategy fsdp2 gathers one at a time, such as a transformer's layers.
        Empty: the members of the model's module lists. Each must be used by calling it."""
        return []

    def facts(self) -> dict[str, float]:
        """Numbers about the data worth printing once at start, such as a baseline's loss."""
        return {}

    def example_inputs(self) -> tuple[Any, ...]:
        """Positional inputs (CPU tensors, batch size 2) for the model's ``forward``, for export."""
        raise NotImplementedError

    def flops_per_sample(self) -> float | None:
        """Floating point operations of a forward and a backward pass over one sample, for the
        model FLOPs utilisation; None where unknown."""
        return None


def batch_size(batch: Any) -> int:
    """The first dimension of the first tensor found in a batch."""
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
