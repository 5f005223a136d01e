"""Computes steps of a run again, and compares them with what the run has logged and saved.

Order and randomness are functions of the position, so a step that is taken again from the
checkpoint before it gives the same loss, norm and weights. Another result means another
computation: changed code or data, or a device that computes wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from train.checkpoint import dcp
from train.data.fetch import MicroBatch
from train.diagnosis.bench import Bench, Taken
from train.diagnosis.signals import Output, watch_outputs

NAMES = {"train/loss": "loss", "train/gradient_norm": "gradient norm"}


class Compared(NamedTuple):
    """A number of the run, and that of the repetition."""

    step: int
    name: str
    """A metric, such as "train/loss"."""
    logged: float
    replayed: float

    @property
    def difference(self) -> float:
        """Relative."""
        if self.logged == self.replayed or (math.isnan(self.logged) and math.isnan(self.replayed)):
            return 0.0
        return abs(self.replayed - self.logged) / max(abs(self.logged), 1e-30)


class Tensor(NamedTuple):
    """How a tensor differs from that of a checkpoint."""

    name: str
    rank: int
    """The first rank whose part differs."""
    difference: float
    """The largest one, relative to the largest element."""


@dataclass
class Replayed:
    """Steps that were taken again."""

    taken: Taken
    """The last one."""
    compared: list[Compared]
    """Of the steps that the run has logged."""
    outputs: dict[int, Output]
    """By step, the first output that is not finite."""
    micro_batches: Sequence[MicroBatch]
    """This rank's, of the last step."""


def replay(
    bench: Bench, last: int, logged: Mapping[str, Mapping[int, float]], *, watch: int | None = None
) -> Replayed:
    """Takes the steps up to ``last`` again; collective. ``logged`` has the metrics of the run by
    name and step. From the step ``watch`` on, looks for outputs that are not finite."""
    taker = bench.steps()
    compared, anomalies = list[Compared](), dict[int, Output]()
    first = bench.progress.step + 1
    loss_sum = float(bench.window.get("loss_sum", 0.0))
    count = float(bench.window.get("count", 0.0))
    with bench.batches(last - first + 1) as batches:
        for step in range(first, last + 1):
            micro_batches = [next(batches) for _ in range(bench.plan.accumulation)]
            if watch is not None and step >= watch:
                with watch_outputs(bench.strategy.bare_model) as outputs:
                    taken = taker.take(micro_batches)
                wrong = next((output for output in outputs if not output.is_finite), None)
                if wrong:
                    anomalies[step] = wrong
            else:
                taken = taker.take(micro_batches)
            if not taken.skipped:
                loss_sum, count = loss_sum + taken.loss * taken.units, count + taken.units
            if step in logged["train/loss"]:
                loss = loss_sum / count if count else math.nan
                loss_sum = count = 0.0
                own = {"train/loss": loss, "train/gradient_norm": taken.grad_norm}
                compared.extend(
                    Compared(step, name, logged[name][step], value)
                    for name, value in own.items()
                    if step in logged[name]
                )
    return Replayed(taken, compared, anomalies, micro_batches)


def differing_tensors(bench: Bench, checkpoint: Path, tolerance: float) -> list[Tensor]:
    """The parameters and buffers that differ from those of a checkpoint by more than ``tolerance``
    of their largest element; collective, the same on all ranks."""
    largest: list[tuple[str, float, float]] = []
    group = bench.engine.collectives.host_group
    stored = dcp.shapes(checkpoint)
    for name, shard in bench.strategy.tensors().items():
        if f"model.{name}" not in stored:
            continue
        expected = replace(shard, local=torch.empty_like(shard.local, device="cpu"))
        dcp.load({f"model.{name}": expected}, checkpoint, group)
        own, wanted = shard.local.detach().cpu().double(), expected.local.double()
        difference = float((own - wanted).abs().max()) if own.numel() else 0.0
        largest.append((name, difference, float(wanted.abs().max()) if wanted.numel() else 0.0))
    by_rank = bench.engine.collectives.all_gather_object(largest)
    return list(_found(by_rank, tolerance))


def _found(by_rank: Sequence[Any], tolerance: float) -> Iterator[Tensor]:
    for parts in zip(*by_rank, strict=True):
        scale = max((part[2] for part in parts), default=0.0) or 1.0
        # not <=, so that a NaN differs
        wrong = [rank for rank, part in enumerate(parts) if not part[1] <= tolerance * scale]
        if wrong:
            yield Tensor(parts[0][0], wrong[0], max(part[1] for part in parts) / scale)
