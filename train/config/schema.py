"""The config of a run: one section per component, each defined beside its component."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from train.checkpoint.checkpoint_config import CheckpointConfig
from train.checkpoint.init_from_config import InitFromConfig
from train.data.loader_config import LoaderConfig
from train.data.plan import BatchConfig
from train.optim.ema import EmaConfig
from train.optim.optim_config import OptimConfig
from train.optim.schedule import ScheduleConfig
from train.paths import expand_home
from train.plugins import Plugin
from train.process.stop import StopConfig
from train.process.watchdog import WatchdogConfig
from train.profiling.profile_config import ProfileConfig
from train.section import Section, name_or_path, names_for_editors, non_semantic
from train.strategies.registry import CHOICES
from train.strategies.strategy_config import DdpConfig, Fsdp2Config, ZeroConfig
from train.tasks.base import Task
from train.track.track_config import TrackConfig

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class RunConfig(Section):
    """The run's name, directory and seed."""

    name: str = non_semantic("run", pattern=r"^[\w][\w.\- ]*$")
    """Name in W&B, in messages and in the default directory."""

    dir: str = non_semantic("")
    """The run directory, which holds all files of the run; name it again to resume. Empty for
    runs/ and the name."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Determines initial weights, sample order, augmentation and dropout."""

    @field_validator("dir")
    @classmethod
    def _is_path(cls, value: str) -> str:
        """The path of a directory, with ``~`` expanded."""
        if "\0" in value:
            raise ValueError("a path without a null character")
        if _URL.match(value):
            raise ValueError(
                "the path of a directory, not a URL (checkpoint.mirror.url is for copies of "
                "checkpoints in an object store)"
            )
        try:
            return expand_home(value)
        except ValueError as error:
            raise ValueError(f"a path that can be expanded ({error})") from None


class TaskConfig(Section):
    """The task; the options of the task itself are in the same section."""

    use: str
    """A built-in task (text, digits) or the dotted path of a class: my_project.task:MyTask."""


class LengthConfig(Section):
    """The length of the run, in steps or in epochs."""

    steps: int | None = Field(None, ge=1)
    """Optimiser steps."""

    epochs: float | None = Field(None, gt=0.0)
    """Passes over the training data, rounded up to whole steps. 0.55 means exactly 55/100."""

    @model_validator(mode="after")
    def _check(self) -> LengthConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "length needs exactly one of length.steps and length.epochs, "
                + (
                    "but has neither"
                    if self.steps is None
                    else "but has both; set one to null, such as length.steps=null"
                )
            )
        return self


class EvaluateConfig(Section):
    """When the model is evaluated on the evaluation data."""

    every_steps: int | None = Field(None, ge=1)
    """Evaluate after each multiple of this many steps; null for never."""

    every_epochs: float | None = Field(None, gt=0.0)
    """Evaluate after the step that completes a multiple of this many passes over the training data;
    null for never. 0.55 means exactly 55/100."""

    at_start: bool = False
    """Also evaluate before the first step."""

    at_end: bool = True
    """Evaluate after the last step."""

    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per rank and forward pass; null for the same as in training."""

    @property
    def is_scheduled(self) -> bool:
        """Whether any evaluation is scheduled."""
        return bool(self.every_steps or self.every_epochs or self.at_start or self.at_end)


class EarlyStopConfig(Section):
    """Ends the run when a metric stops improving."""

    metric: str = "loss"
    """Name of the evaluation metric."""

    mode: Literal["min", "max"] = "min"
    """Whether smaller (min) or larger (max) is better."""

    patience: int = Field(3, ge=1)
    """Consecutive evaluations without improvement after which the run ends."""

    min_delta: float = Field(0.0, ge=0.0)
    """Minimum change of the metric that counts as an improvement."""


class Config(Section):
    """What a run computes and writes. Where it runs is not part of the config."""

    run: RunConfig = RunConfig()
    """The run's name, directory and seed."""

    task: Any
    """The task and its options."""

    model: Any = {}
    """The task's model."""

    data: Any = {}
    """The task's data."""

    init_from: InitFromConfig | None = None
    """Start from existing weights; null for the initial weights of the model as built."""

    batch: BatchConfig
    """Samples per optimiser step."""

    length: LengthConfig
    """The length of the run."""

    optim: OptimConfig = OptimConfig()
    """The optimiser and gradient clipping."""

    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate schedule."""

    ema: EmaConfig | None = None
    """Exponential moving average of the weights; null for none."""

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
    """Keep only the inputs of the model's blocks and recompute their activations in the backward
    pass: much less memory, about a third more time. The blocks are those of the strategy fsdp2."""

    compile: bool = non_semantic(False)
    """Compile the model with torch.compile."""

    deterministic: bool = non_semantic(False)
    """Use only deterministic operations, which may be slower on a GPU. On the CPU, a run with the
    same number of threads is deterministic without it."""

    evaluate: EvaluateConfig = non_semantic(EvaluateConfig())
    """When the model is evaluated."""

    early_stop: EarlyStopConfig | None = None
    """End the run when a metric stops improving; null for never."""

    checkpoint: CheckpointConfig = non_semantic(CheckpointConfig())
    """When checkpoints are written, and which are kept."""

    stop: StopConfig = non_semantic(StopConfig())
    """How a run ends when it is asked to stop."""

    watchdog: WatchdogConfig = non_semantic(WatchdogConfig())
    """When a run is considered to hang."""

    track: TrackConfig = non_semantic(TrackConfig())
    """What is logged, and where."""

    profile: ProfileConfig | None = non_semantic(None)
    """Traces of some steps by torch.profiler; null for none, {} for the defaults."""

    loader: LoaderConfig = non_semantic(LoaderConfig())
    """How samples are loaded."""

    hooks: list[Plugin] = non_semantic([])
    """Your own code that the run calls: subclasses of train.Hook, by dotted path."""

    @field_validator("strategy")
    @classmethod
    def _check_strategy(cls, name: str) -> str:
        return name_or_path(name, CHOICES, "module.path:Class")

    def __reduce__(self) -> tuple[Any, ...]:
        # For data workers that are not forked: each process creates the class again.
        return _unpickle, (self.model_dump(),)


def _unpickle(values: dict[str, Any]) -> Config:
    from train.tasks.registry import find_task

    return config_class(find_task(values["task"]["use"], "pickle")).model_validate(values)


def config_class(task: type[Task]) -> type[Config]:
    """The config class with the sections of a task."""
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
