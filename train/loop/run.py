"""A run that is open: its parts, ready for the loop.

:mod:`train.loop.open_run` puts it together and :mod:`train.loop.fit` runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.checkpoint.run_directory import RunDirectory
from train.config.load import LoadedConfig
from train.data.loader import Batches
from train.data.plan import BatchPlan
from train.goodput.ledger import GoodputLedger
from train.hooks import Hooks
from train.loop.checkpointing import Checkpointing
from train.loop.data_watch import DataWatch
from train.loop.early_stop import EarlyStop
from train.loop.evaluation import Evaluation
from train.loop.first_step import FirstStepChecks
from train.loop.state import Progress
from train.loop.step_metrics import StepMetrics
from train.loop.stragglers import Stragglers
from train.loop.train_step import TrainStep
from train.loop.triggers import Triggers
from train.optim.spikes import SpikeGuard
from train.setup.build import RunData, TrainableModel
from train.setup.find_run import Attempt
from train.setup.init_from import Loaded
from train.setup.join import Joined
from train.strategies.engine import Engine
from train.tasks.base import Task
from train.track.tracker import Tracker

if TYPE_CHECKING:
    from train.profiling.recorder import Recorder


@dataclass(frozen=True)
class OpenRun:
    """One attempt at a run. Functions of the loop take the parts that they use."""

    loaded: LoadedConfig
    directory: RunDirectory
    joined: Joined
    beat: Callable[[str], None]
    """Tells the watchdog what this rank starts to do now."""
    task: Task
    data: RunData
    plan: BatchPlan
    """How each step is divided into micro-batches."""
    model: TrainableModel
    initial: Loaded | None
    """What was loaded from ``init_from``; None if the initial weights are those of the model as
    built, or of a resumed run."""
    progress: Progress
    metrics: StepMetrics
    stragglers: Stragglers
    triggers: Triggers
    early_stop: EarlyStop | None
    spikes: SpikeGuard | None
    """None where the run does not look for spikes."""
    tracker: Tracker
    checkpointing: Checkpointing
    hooks: Hooks
    recorder: Recorder | None
    """None where this rank records no profile."""
    evaluation: Evaluation | None
    """None where the task has no evaluation data."""
    first_step: FirstStepChecks
    train_step: TrainStep
    data_watch: DataWatch
    batches: Batches
    """This rank's micro-batches of all steps to come."""

    @property
    def engine(self) -> Engine:
        """This process's engine."""
        return self.joined.engine

    @property
    def goodput(self) -> GoodputLedger:
        """Where the time of this attempt goes."""
        return self.joined.goodput

    @property
    def attempt(self) -> Attempt:
        """Which start of the run this is."""
        return self.joined.attempt

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping has ended the run."""
        return self.early_stop is not None and self.early_stop.stopped

    @property
    def resume_command(self) -> str:
        """The command that resumes this run."""
        return self.loaded.command("fit")

    def resume_point(self) -> str:
        """A sentence: from which step the run resumes if it ends now."""
        return resume_point(self.checkpointing.last_step_on_disk, self.progress.step)


def resume_point(saved: int | None, step: int) -> str:
    """A sentence: the newest checkpoint is of step ``saved``, and the run is at ``step``."""
    lost = f"; the {step - (saved or 0)} steps since are lost" if step > (saved or 0) else ""
    return f"The last committed checkpoint is that of step {saved or 0}{lost}. Rerun to resume."
