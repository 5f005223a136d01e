"""Steps whose loss or gradient norm is far above that of the steps before them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from train.section import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class SpikeConfig(Section):
    """What happens at a spike: a step whose loss or gradient norm is above a limit."""

    factor: float = Field(gt=1.0)
    """A loss or gradient norm above this times the median of the window is a spike. For a negative
    median m of the loss the limit is m + (factor - 1) * |m|; a median of 0 sets no limit."""

    window: int = Field(100, ge=2, le=100_000)
    """Steps of which the median is taken: the last ones that were not skipped. There is no limit
    before there are that many."""

    action: Literal["skip", "rollback", "stop"] = "skip"
    """skip: the step does not change the weights, as one that is not finite. rollback: end the
    attempt with exit code 75; the next one goes on from the last checkpoint, with the samples after
    the step. stop: as skip, then save a checkpoint and end the run with exit code 78; a rerun goes
    on after the step."""

    def skipping(self) -> SpikeConfig:
        """The same limits for steps that are taken again: the run has its other actions."""
        return self.model_copy(update={"action": "skip"})


class Judgement(NamedTuple):
    """What becomes of a step, as fp32 tensors that stay on the device."""

    skipped: Tensor
    """Scalar: 1.0 where the weights must not change, else 0.0."""
    limits: Tensor | None
    """Shape (2,): above which mean loss and which gradient norm a step is a spike; None where the
    run does not look for spikes."""


Judge = Callable[["Tensor", "Tensor"], Judgement]
"""Judges a step by its global loss sum and gradient norm, scalars on the device. These are the same
on all ranks, so that all ranks skip the step or none does."""


def judge_finite(loss_sum: Tensor, norm: Tensor) -> Judgement:
    """Skips a step whose loss or norm is not finite."""
    import torch

    return Judgement(1.0 - torch.isfinite(norm + loss_sum).float(), None)


class SpikeGuard:
    """Judges steps by those before them. The window is on the device, so that no step waits for it.

    The decisions depend on the losses and norms alone, and a checkpoint has the window: they are
    the same on any placement, with any micro-batches and after a resume.
    """

    def __init__(self, config: SpikeConfig, device: torch.device) -> None:
        import torch

        self._config = config
        # Rows: mean loss, gradient norm; the newest last. NaN where there is none yet.
        self._window = torch.full((2, config.window), float("nan"), device=device)
        self._newest: Tensor | None = None
        self._copied: Any = None

    @property
    def rolls_back(self) -> bool:
        """Whether the attempt ends at a spike, without a checkpoint."""
        return self._config.action == "rollback"

    def judge(self, loss_sum: Tensor, norm: Tensor, *, count: int) -> Judgement:
        """Judges the next step, and adds it to the window unless it is skipped. ``count``: units of
        the global batch."""
        import torch

        with torch.no_grad():
            values = torch.stack([loss_sum / count, norm]).to(self._window)
            ordered = self._window.sort(dim=1).values  # NaN is the largest
            median = ordered[:, (self._config.window - 1) // 2]
            limits = median + (self._config.factor - 1.0) * median.abs()
            known = ordered[:, -1].isfinite() & (median != 0)
            limits = torch.where(known, limits, float("inf"))
            spike = (values > limits).any() & values.isfinite().all()
            skipped = spike | ~torch.isfinite(norm + loss_sum)
            moved = torch.cat([self._window[:, 1:], values[:, None]], dim=1)
            self._window = torch.where(skipped, self._window, moved)
        if self._config.action != "skip":
            self._copy(spike)
        return Judgement(skipped.float(), limits)

    def _copy(self, spike: Tensor) -> None:
        """Starts a copy of the decision to the host."""
        import torch

        self._newest = spike
        if spike.device.type == "cuda":
            self._newest = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._newest.copy_(spike, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def ends_run(self) -> bool:
        """Whether the newest step is a spike at which the attempt ends. Waits for that step, which
        costs nothing while the device has the forward pass of the next one to compute."""
        if self._newest is None:
            return False
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._newest.item())

    def go_on(self) -> None:
        """The run goes on although the newest step is a spike."""
        self._newest = None

    def state_dict(self) -> dict[str, list[float]]:
        """The window as JSON values, the newest step last. Waits for the device."""
        losses, norms = self._window.tolist()
        return {
            "loss": [value for value in losses if not math.isnan(value)],
            "norm": [value for value in norms if not math.isnan(value)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned; of a longer window, its newest steps."""
        import torch

        self._window.fill_(float("nan"))
        for row, name in enumerate(("loss", "norm")):
            values = state[name][-self._config.window :]
            if values:
                newest = torch.tensor(values, dtype=self._window.dtype)
                self._window[row, -len(values) :] = newest.to(self._window.device)
