"""Calls the methods of a task and checks what they return, so that a mistake in a task is one
sentence that names the method.

The checks look at types and shapes only: none waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train.exits import UsageError
from train.tasks.base import Ratio, Task

RESERVED_METRICS = ("checkpoint",)
"""Names that a metric cannot have: the keys beside the metrics in the JSON of ``evaluate``. In all
other files, metrics have a prefix or an object of their own."""


def model_of(task: Task) -> nn.Module:
    """The model that the task builds."""
    model = task.build_model()
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"The task's build_model() returned {_kind(model)}; return a torch.nn.Module."
        )
    return model


def blocks_of(task: Task, model: nn.Module) -> list[nn.Module]:
    """The blocks that the task names; empty for none."""
    blocks: Any = task.blocks(model)
    if not isinstance(blocks, (list, tuple, nn.ModuleList)):
        raise UsageError(f"The task's blocks() returned {_kind(blocks)}; return a list of modules.")
    for block in blocks:
        if not isinstance(block, nn.Module):
            raise UsageError(
                f"The task's blocks() returned a list that holds {_kind(block)}; return modules of "
                "the model."
            )
    return list(blocks)


def count_of(task: Task, batch: Any) -> int:
    """The count of the loss of a batch on the host."""
    count: Any = task.count(batch)
    # Counts are added as 64-bit integers over all micro-batches and ranks.
    if not _is_scalar(count) or not (0 <= float(count) < 2**53 and float(count).is_integer()):
        raise UsageError(
            f"The task's count() returned {_shown(count)}; return the whole number of "
            f"{task.unit} in the batch."
        )
    return int(count)


def loss_of(task: Task, model: nn.Module, batch: Any) -> Ratio:
    """The loss of a batch; its sum is a scalar, in training with an autograd graph."""
    loss: Any = task.loss(model, batch)
    if not isinstance(loss, Ratio):
        raise UsageError(
            f"The loss() of the task {task.config.task.use!r} returned {_kind(loss)}; return "
            "train.Ratio(sum, count), such as Ratio(errors.sum(), len(errors))."
        )
    if not isinstance(loss.sum, Tensor) or loss.sum.ndim:
        raise UsageError(
            f"The task's loss() returned {_shown(loss.sum)} as the sum; return a scalar tensor: "
            "the loss summed over the batch."
        )
    if loss.sum.is_complex():
        raise UsageError(
            f"The task's loss() returned a complex sum ({loss.sum.dtype}); return a real one, such "
            "as its abs() or its real part."
        )
    if torch.is_grad_enabled() and not loss.sum.requires_grad:
        raise UsageError(
            "The task's loss() returned a sum without an autograd graph, so it has no gradient; "
            "compute it from the model's output, without detach(), item() or torch.no_grad(), also "
            "for a batch without any target (0 * output.sum())."
        )
    if not _is_scalar(loss.count):
        raise UsageError(
            f"The task's loss() returned {_shown(loss.count)} as the count; return a number or a "
            "scalar tensor."
        )
    return loss


def metrics_of(task: Task) -> dict[str, Any]:
    """The torchmetrics objects of the task, by name."""
    metrics: Any = task.metrics()
    if not isinstance(metrics, Mapping):
        raise UsageError(
            f"The task's metrics() returned {_kind(metrics)}; return a dict of torchmetrics "
            "objects by name."
        )
    if metrics:
        from torchmetrics import Metric, MetricCollection

        for name, metric in metrics.items():
            _check_name(name, "metrics()")
            if not isinstance(metric, (Metric, MetricCollection)):
                raise UsageError(
                    f"The task's metrics() returned {_kind(metric)} for {name!r}; return a "
                    "torchmetrics object, whose states can be merged over ranks."
                )
    return dict(metrics)


def measures_of(
    task: Task, model: nn.Module, batch: Any, objects: Container[str]
) -> dict[str, Any]:
    """The metrics of one evaluation batch: a tuple of arguments for each name in ``objects``, those
    of the task's torchmetrics objects, and a Ratio of scalars for each other name."""
    measures: Any
    if type(task).measure is Task.measure:
        measures = {"loss": loss_of(task, model, batch)}
    else:
        measures = task.measure(model, batch)
    if not isinstance(measures, Mapping):
        raise UsageError(
            f"The task's measure() returned {_kind(measures)}; return a dict of Ratios by name."
        )
    for name, value in measures.items():
        _check_name(name, "measure()")
        if name in objects:
            if isinstance(value, Ratio) or not isinstance(value, (tuple, list)):
                raise UsageError(
                    f"The task's measure() returned {_kind(value)} for {name!r}; return the tuple "
                    "of arguments of the torchmetrics object's update()."
                )
        elif not isinstance(value, Ratio):
            raise UsageError(
                f"The task's measure() returned {_kind(value)} for {name!r}; "
                "return a Ratio(sum, count), or name a torchmetrics object in metrics()."
            )
        elif not all(_is_scalar(part) for part in value):
            wrong = next(part for part in value if not _is_scalar(part))
            raise UsageError(
                f"The task's measure() returned {_shown(wrong)} in the Ratio for {name!r}; sum "
                "and count must be numbers or scalar tensors."
            )
    return dict(measures)


def numbers_of(values: Any, source: str) -> dict[str, float]:
    """The metrics that ``source`` has computed, as numbers, which checkpoints and messages need."""
    found = {}
    if not isinstance(values, Mapping):
        raise UsageError(
            f"The task's {source} returned {type(values).__name__}; return numbers by name, such "
            "as {'perplexity': 8.5}."
        )
    for name, value in values.items():
        _check_name(name, source)
        try:
            if isinstance(value, str):
                raise TypeError("text")
            found[name] = float(value)  # also of a scalar of torch or numpy
        except (TypeError, ValueError, RuntimeError, OverflowError):
            shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
            raise UsageError(
                f"The task's {source} returned {type(value).__name__}{shape} for {name!r}; return "
                "a number."
            ) from None
    return found


def _check_name(name: object, source: str) -> None:
    if not isinstance(name, str) or not name:
        raise UsageError(
            f"The task's {source} returned the name {name!r}, which is not text; return results "
            "by name, such as 'accuracy'."
        )
    is_stored = source not in ("report()", "check_report()")
    if is_stored and any("\ud800" <= character <= "\udfff" for character in name):
        raise UsageError(
            f"The task's {source} returned the name {name!r}, which has half of a surrogate pair, "
            "so it cannot be stored; decode it as UTF-8."
        )
    if is_stored and name in RESERVED_METRICS:
        raise UsageError(
            f"The task's {source} returned a metric named {name!r}, a key that `evaluate --json` "
            "has itself; rename the metric."
        )


def facts_of(task: Task) -> dict[str, float]:
    """The task's numbers on the data, by name."""
    facts: Any = task.facts()
    if not isinstance(facts, Mapping) or not all(_is_scalar(fact) for fact in facts.values()):
        wrong = facts
        if isinstance(facts, Mapping):
            wrong = next((name, _shown(v)) for name, v in facts.items() if not _is_scalar(v))
        raise UsageError(
            f"The task's facts() returned {wrong!r:.200}; return a dict of numbers by name."
        )
    return {name: float(fact) for name, fact in facts.items()}


def report_of(
    task: Task, model: nn.Module, device: torch.device, *, check: bool = False
) -> dict[str, Any]:
    """The texts and images of the task, by name; empty for None. ``check``: those of
    ``check_report``."""
    name = "report"
    if check:
        # Of the class that has the newer report: a subclass may override only the whole one.
        owner = next(c for c in type(task).__mro__ if {"report", "check_report"} & vars(c).keys())
        name = "check_report" if owner is not Task and "check_report" in vars(owner) else "report"
    source = f"{name}()"
    report: Any = getattr(task, name)(model, device)
    if report is not None and not isinstance(report, Mapping):
        raise UsageError(
            f"The task's {source} returned {_kind(report)}; return a dict of texts and images by "
            "name."
        )
    for key in report or {}:
        _check_name(key, source)
    return dict(report or {})


def flops_of(task: Task) -> float | None:
    """The task's FLOPs of one sample; None if unknown."""
    flops: Any = task.flops_per_sample()
    if flops is not None and not (_is_scalar(flops) and 0 <= float(flops) < math.inf):
        raise UsageError(
            f"The task's flops_per_sample() returned {_shown(flops)}; return a number of at least "
            "0, or None."
        )
    return None if flops is None else float(flops)


def _is_scalar(value: object) -> bool:
    """Whether the value is one real number: of Python or numpy, or a tensor with one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, (np.generic, np.ndarray)):
        return value.ndim == 0 and value.dtype.kind in "biuf"
    return isinstance(value, Real) and _is_float(value)


def _is_float(value: Real) -> bool:
    """Whether the number is in the range of a float: an int or a Fraction may be larger."""
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Real):
        # A text of thousands of digits is an error of Python.
        large = f"{_kind(value)} beyond the range of a float"
        return repr(value) if _is_float(value) else large
    return _kind(value)
