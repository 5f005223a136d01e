"""The whole config of a run: one section per component, each defined beside its component."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from train.checkpoint.checkpoint_config import CheckpointConfig
from train.data.loader_config import LoaderConfig
from train.data.plan import BatchConfig
from train.optim.ema import EmaConfig
from train.optim.optimizer import OptimConfig
from train.optim.schedule import ScheduleConfig
from train.plugins import Plugin
from train.process.stop import StopConfig
from train.process.watchdog import WatchdogConfig
from train.section import Section, name_or_path, names_for_editors, non_semantic
from train.strategies.registry import CHOICES
from train.strategies.strategy_config import DdpConfig, Fsdp2Config, ZeroConfig
from train.tasks.base import Task
from train.track.track_config import TrackConfig


class RunConfig(Section):
    """The run's name, place and seed."""

    name: str = non_semantic("run", pattern=r"^[\w][\w.\- ]*$")
    """For people: in W&B, in messages, and in the default directory."""

    dir: str = non_semantic("")
    """The run directory: everything the run writes lies in it, and resuming means naming it
    again. By default runs/ and the name."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Decides initial weights, sample order, augmentation and dropout."""


class TaskConfig(Section):
    """Which task is trained; the task's own options follow in the same section."""

    use: str
    """A built-in task (text, digits) or the dotted path of a class: my_project.task:MyTask."""


class LengthConfig(Section):
    """How long the run is: either steps or epochs."""

    steps: int | None = Field(None, ge=1)
    """Optimiser steps."""

    epochs: float | None = Field(None, gt=0.0)
    """Passes over the training data; the last step may run over into the next pass, since
    every step has the same global batch size."""

    @model_validator(mode="after")
    def _check(self) -> LengthConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "length needs exactly one of length.steps and length.epochs, "
                + ("but has neither" if self.steps is None else "but has both; set one to null")
            )
        return self


class EvaluateConfig(Section):
    """When the model is evaluated on the evaluation data."""

    every_steps: int | None = Field(None, ge=1)
    """Evaluate each time the step is a multiple of this; null for no such rule."""

    every_epochs: float | None = Field(None, gt=0.0)
    """Evaluate each time so many more passes over the training data are complete."""

    at_start: bool = False
    """Evaluate before the first step as well."""

    at_end: bool = True
    """Evaluate after the last step."""

    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per rank and forward pass; by default as in training."""


class EarlyStopConfig(Section):
    """Ends the run when a metric has stopped getting better."""

    metric: str = "loss"
    """Name of the evaluation metric that is watched."""

    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""

    patience: int = Field(3, ge=1)
    """Evaluations in a row without improvement after which the run ends."""

    min_delta: float = Field(0.0, ge=0.0)
    """By how much the metric must change to count as better."""


class Config(Section):
    """What a run computes and what it writes. It says nothing of where it is computed."""

    run: RunConfig = RunConfig()
    """The run's name, place and seed."""

    task: Any
    """The task and its options."""

    model: Any = {}
    """The task's model."""

    data: Any = {}
    """The task's data."""

    batch: BatchConfig
    """Samples per optimiser step."""

    length: LengthConfig
    """How long the run is."""

    optim: OptimConfig = OptimConfig()
    """The optimiser and gradient clipping."""

    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""

    ema: EmaConfig | None = None
    """An average of the weights; null for none."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward passes; weights and optimiser state stay fp32. bf16 and
    fp16 are torch's automatic mixed precision, fp16 with dynamic loss scaling."""

    strategy: str = non_semantic("auto", json_schema_extra=names_for_editors(CHOICES))
    """How parameters, gradients and optimiser state are sharded over the ranks: ddp, fsdp2, zero1,
    zero2, zero3, or the dotted path of a class, such as my_project.strategies:MyStrategy. auto:
    ddp for several ranks."""

    strategy_options: dict[str, Any] = non_semantic({})
    """Options of a strategy that is named by its dotted path."""

    ddp: DdpConfig = DdpConfig()
    """Options of the strategy ddp."""

    fsdp2: Fsdp2Config = Fsdp2Config()
    """Options of the strategy fsdp2."""

    zero: ZeroConfig = ZeroConfig()
    """Options of the strategies zero1, zero2 and zero3."""

    activation_checkpointing: bool = non_semantic(False)
    """Keep only the inputs of the model's blocks, and compute their insides again for backward:
    much less memory, about a third more time. Blocks are those of the strategy fsdp2."""

    compile: bool = non_semantic(False)
    """Compile the model with torch.compile."""

    deterministic: bool = non_semantic(False)
    """Use only operations that give the same bits each time, at some cost in speed on a GPU. On
    the CPU a run with the same threads repeats its bits without it."""

    evaluate: EvaluateConfig = non_semantic(EvaluateConfig())
    """When the model is evaluated."""

    early_stop: EarlyStopConfig | None = None
    """End the run early when a metric stops getting better; null for never."""

    checkpoint: CheckpointConfig = non_semantic(CheckpointConfig())
    """When checkpoints are written and which are kept."""

    stop: StopConfig = non_semantic(StopConfig())
    """How a run that is asked to stop comes to its end."""

    watchdog: WatchdogConfig = non_semantic(WatchdogConfig())
    """When a run counts as hanging."""

    track: TrackConfig = non_semantic(TrackConfig())
    """What is logged, and where to."""

    loader: LoaderConfig = non_semantic(LoaderConfig())
    """How samples are loaded."""

    hooks: list[Plugin] = non_semantic([])
    """Code of your own that the run calls: classes derived from train.Hook, by dotted path."""

    @field_validator("strategy")
    @classmethod
    def _check_strategy(cls, name: str) -> str:
        return name_or_path(name, CHOICES, "module.path:Class")

    def __reduce__(self) -> tuple[Any, ...]:
        # For data workers that are not forked: the class itself is made anew in each process.
        return _unpickle, (self.model_dump(),)


def _unpickle(values: dict[str, Any]) -> Config:
    from train.tasks.registry import find_task

    return config_class(find_task(values["task"]["use"], "pickle")).model_validate(values)


def config_class(task: type[Task]) -> type[Config]:
    """The config with the sections of this task filled in."""
    options = create_model(
        "TaskConfig", __base__=(task.Options, TaskConfig), __doc__=TaskConfig.__doc__
    )
    return create_model(
        "Config",
        __base__=Config,
        __doc__=Config.__doc__,
        task=(options, Field(description="The task and its options.")),
        model=(
            task.Model,
            Field(default_factory=dict, validate_default=True, description="The task's model."),
        ),
        data=(
            task.Data,
            Field(default_factory=dict, validate_default=True, description="The task's data."),
        ),
    )
