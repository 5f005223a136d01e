"""The metrics of the steps since the last log line: losses on the device, times on the host."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from train.data.ledger import Skip
from train.goodput.clock import PhaseClock
from train.goodput.phases import Phase
from train.loop.mfu import peak_flops
from train.loop.state import Progress, SkippedStep
from train.strategies.base import StepResult


class StepMetrics:
    """Collects the results of steps and computes the numbers of a log line from them.

    Nothing is read from the device before ``read``, so that steps never wait for the device.

    ``unit`` is what the task counts, ``flops_per_sample`` the floating point operations of a
    forward and backward pass (None where unknown), ``dataset_size`` the samples of an epoch.
    ``clock`` is this rank's, of which the times are read.
    """

    def __init__(
        self,
        clock: PhaseClock,
        *,
        unit: str,
        flops_per_sample: float | None,
        device: torch.device,
        precision: str,
        world_size: int,
        global_batch_size: int,
        dataset_size: int,
        looks_for_spikes: bool = False,
    ) -> None:
        self._clock, self._looks_for_spikes = clock, looks_for_spikes
        self._unit, self._device, self._world_size = unit, device, world_size
        self._global_batch_size, self._dataset_size = global_batch_size, dataset_size
        self._flops, self._peak = flops_per_sample, peak_flops(device, precision)
        self._unread: list[tuple[StepResult, int]] = []
        self._loss_sum = self._count = 0.0
        self._norm = self._learning_rate = float("nan")
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._started = time.perf_counter()
        self._timed_steps = self._timed_units = 0
        self._before = self._clock.totals()

    def _seconds(self, phase: Phase) -> float:
        """Of a phase, since the last log line."""
        return self._clock.totals().get(phase, 0.0) - self._before.get(phase, 0.0)

    def timed(self, phase: Phase) -> AbstractContextManager[None]:
        """Adds the seconds of the body to those of ``phase``."""
        return self._clock.within(phase)

    def add(self, result: StepResult, count: int, learning_rate: float) -> None:
        """Adds a step whose loss was divided by ``count`` units."""
        self._learning_rate = learning_rate
        self._unread.append((result, count))
        self._timed_steps += 1
        self._timed_units += count

    @property
    def own_seconds(self) -> tuple[float, float]:
        """Seconds per step that this rank spends on loading data and on forward passes, without
        waiting for other ranks. With a GPU, only the time of the host."""
        steps = max(1, self._timed_steps)
        return self._seconds("data") / steps, self._seconds("forward") / steps

    @property
    def unread_steps(self) -> int:
        """Steps whose numbers are still on the device."""
        return len(self._unread)

    def read(self) -> list[SkippedStep | None]:
        """Copies all numbers from the device, at once. Returns, for each step since the last
        call, why it was skipped; None where it was not."""
        if not self._unread:
            return []
        rows = torch.stack([_numbers(result) for result, _ in self._unread]).tolist()
        steps: list[SkippedStep | None] = []
        for (loss_sum, norm, skipped, *limits), (_, count) in zip(rows, self._unread, strict=True):
            if not skipped:
                self._loss_sum += loss_sum
                self._count += count
            self._norm = norm
            mean = loss_sum / count if count else math.nan
            steps.append(_reason(mean, norm, limits) if skipped else None)
        self._unread.clear()
        return steps

    def compute(self, progress: Progress) -> dict[str, float]:
        """The numbers of a log line over the steps since the last call, which start anew.

        ``train/loss`` is the mean over all units of these steps but the skipped ones. Call
        ``read`` before.
        """
        now = time.perf_counter()
        steps = max(1, self._timed_steps)
        data, checkpoint = self._seconds("data"), self._seconds("checkpoint")
        evaluation = self._seconds("evaluation")
        training = max(1e-9, now - self._started - evaluation)
        compute = training - data - checkpoint
        samples = self._timed_steps * self._global_batch_size
        metrics = {
            "train/loss": self._loss_sum / self._count if self._count else float("nan"),
            "train/learning_rate": self._learning_rate,
            "train/gradient_norm": self._norm,
            "train/epoch": progress.position / self._dataset_size,
            "train/skipped_steps": float(progress.skipped_steps),
            **({"train/spikes": float(progress.spikes)} if self._looks_for_spikes else {}),
            "speed/samples_per_second": samples / training,
            "time/step": training / steps,
            "time/data": data / steps,
            "time/compute": compute / steps,
            "time/checkpoint_stall": checkpoint / steps,
            "time/evaluation": evaluation / steps,
            **_memory(self._device),
        }
        if self._unit != "samples":
            metrics[f"speed/{self._unit}_per_second"] = self._timed_units / training
        if self._flops and self._peak:
            achieved = samples * self._flops / training / self._world_size
            metrics["speed/mfu"] = achieved / self._peak
        self._loss_sum = self._count = 0.0
        self._restart_clock()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last log line, so that a resumed run logs the same numbers."""
        return {
            "loss_sum": self._loss_sum,
            "count": self._count,
            "norm": self._norm if self._norm == self._norm else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._loss_sum, self._count = state["loss_sum"], state["count"]
        self._norm = float("nan") if state["norm"] is None else state["norm"]


def _numbers(result: StepResult) -> torch.Tensor:
    """The numbers of a step in one tensor: loss sum, norm, skipped, and the limits if any."""
    scalars = torch.stack([result.loss_sum, result.grad_norm, result.skipped])
    return scalars if result.limits is None else torch.cat([scalars, result.limits])


def _reason(loss: float, norm: float, limits: Sequence[float]) -> SkippedStep:
    """Why a step with this mean loss was skipped."""
    if math.isfinite(loss) and math.isfinite(norm):
        for what, value, limit in zip(
            ("loss", "gradient norm"), (loss, norm), limits, strict=False
        ):
            if value > limit:
                return SkippedStep(Skip.SPIKE, f"the {what} is {value:.6g}, above {limit:.6g}")
    return SkippedStep(Skip.NOT_FINITE, "the loss or the gradient norm is not finite")


def _memory(device: torch.device) -> dict[str, float]:
    """GiB in use: the resident set of this process, and the peak allocation on the device."""
    memory = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[1])
        memory["memory/rss_gib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    if device.type == "cuda":
        memory["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return memory
