"""Builds what a run computes with: the engine, the data, and the model with its optimiser."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from train.checkpoint.extra_state import check_extra_state
from train.config.explain import explain
from train.config.load import LoadedConfig, check_length
from train.config.schema import Config
from train.data.epochs import steps_in
from train.data.loader import Batches, check_dataset, evaluation_batches
from train.data.order import SampleOrder, dataset_seed, initial_seed
from train.data.plan import BatchPlan, EvalPlan
from train.distributed.collectives import Collectives
from train.distributed.process_group import timeout_of
from train.distributed.randomness import seed_everything
from train.distributed.world import this_world
from train.exits import DataError, UsageError
from train.optim.ema import Ema
from train.optim.groups import parameter_settings
from train.optim.optimizer import build_optimizer
from train.private_directory import use_private_caches
from train.section import Section
from train.setup.compiler import check_compiler
from train.setup.fingerprint import DataFingerprint
from train.setup.model_summary import model_summary
from train.setup.same_parts import check_same_data, check_same_model
from train.strategies.base import Strategy, StrategySetup
from train.strategies.blocks import find_blocks
from train.strategies.buffers import SharedBuffers
from train.strategies.engine import Engine
from train.strategies.meta_init import build_model
from train.strategies.parameters import (
    check_memory,
    check_modules,
    check_parameters,
    empty_to_buffers,
)
from train.strategies.recomputation import checkpoint_activations
from train.strategies.registry import find_strategy, resolve_name
from train.suggest import listed
from train.tasks.base import Task
from train.tasks.checked import blocks_of
from train.tasks.modes import start_training


@dataclass(frozen=True)
class StrategyChoice:
    """The strategy that a run uses."""

    name: str
    cls: type[Strategy]
    options: Any
    """The validated section with the strategy's options."""


def choose_strategy(loaded: LoadedConfig) -> StrategyChoice:
    """The strategy of a config in this world. Raises UsageError where it does not exist or does
    not accept its options."""
    config = loaded.config
    name = resolve_name(config.strategy, this_world().world_size)
    cls = find_strategy(name, loaded.composed.origin("strategy"))
    _check_options(loaded, name, cls)
    options = getattr(config, cls.section)
    if cls.section == "strategy_options":
        try:
            options = cls.Options.model_validate(options)
        except ValidationError as error:
            raise explain(error, cls.Options, loaded.composed, "strategy_options.") from None
    return StrategyChoice(name, cls, options)


def _check_options(loaded: LoadedConfig, name: str, cls: type[Strategy]) -> None:
    """Refuses options that the strategy would not read."""
    composed = loaded.composed
    strategy = f"strategy ({composed.origin('strategy')}) names {name!r}"
    section = getattr(loaded.config, cls.section, None)
    is_section = isinstance(cls.Options, type) and issubclass(cls.Options, Section)
    if section is None or not is_section:
        raise UsageError(
            f"{strategy}, whose options are not a config section; derive its Options from "
            "train.Section, and set section to strategy_options, ddp, fsdp2 or zero."
        )
    if cls.section == "strategy_options":
        return
    if not isinstance(section, cls.Options):
        raise UsageError(
            f"{strategy}, whose Options are not read, because its section is {cls.section!r}; set "
            'section = "strategy_options" in the class, or remove Options.'
        )
    if given := loaded.config.strategy_options:
        raise UsageError(
            f"strategy_options is {given!r} ({composed.where('strategy_options')}), but the "
            f"strategy {name} reads the section {cls.section}; set its keys there, or remove "
            "strategy_options."
        )


def build_engine(
    config: Config,
    strategy: StrategyChoice,
    joining: AbstractContextManager[object] | None = None,
) -> Engine:
    """This process's engine; collective. Returns when all ranks have joined; ``joining`` surrounds
    the wait for them."""
    use_private_caches()
    return Engine(
        this_world(),
        precision=config.precision,
        deterministic=config.deterministic,
        distributed=strategy.name != "single",
        timeout=timeout_of(config.watchdog.first_timeout, config.watchdog.timeout),
        kwargs_handlers=strategy.cls.kwargs_handlers(strategy.options),
        joining=joining,
    )


@dataclass(frozen=True)
class RunData:
    """The data of a run, and how long the run is."""

    train: Any
    """A map-style dataset."""
    evaluation: Any | None
    """The same for evaluation; None where the task has none."""
    fingerprint: DataFingerprint
    """That of the training data."""
    order: SampleOrder
    total_steps: int
    warnings: list[str]
    """What the user must know of the data."""


def build_data(
    loaded: LoadedConfig,
    task: Task,
    collectives: Collectives,
    device: torch.device,
    *,
    step: int = 0,
    position: int = 0,
) -> RunData:
    """The datasets, the order of samples and the number of steps, from the config and the seed
    alone; collective. ``step`` steps have taken ``position`` samples in earlier attempts. Raises
    DataError or UsageError for data that a run cannot use."""
    config = loaded.config
    seed_everything(dataset_seed(config.run.seed), device)
    train = task.train_dataset()
    check_dataset(train, "train_dataset")
    evaluation = evaluation_data(task, config.run.seed, device)
    datasets = {"train_dataset": train, "eval_dataset": evaluation}
    fingerprints = {
        name: DataFingerprint(dataset, config.run.seed, config.loader)
        for name, dataset in datasets.items()
    }
    warnings = check_same_data(collectives, fingerprints)
    if evaluation is None and (asked := _asks_for_evaluation(config)):
        raise DataError(
            f"The task {config.task.use!r} has no evaluation data, but {asked} asks for "
            f"evaluation; implement eval_dataset(), or unset {asked}."
        )
    steps = config.length.steps
    if steps is None:
        assert config.length.epochs is not None
        batch_size = config.batch.global_batch_size
        steps = steps_in(config.length.epochs, len(train), batch_size, step=step, position=position)
    check_length(config, loaded.composed, steps)
    order = SampleOrder(config.run.seed, len(train))
    return RunData(train, evaluation, fingerprints["train_dataset"], order, steps, warnings)


def evaluation_data(task: Task, seed: int, device: torch.device) -> Any | None:
    """The dataset for evaluation, None where the task has none. The generators start as for the
    training dataset: a random split that both functions draw is the same."""
    seed_everything(dataset_seed(seed), device)
    dataset = task.eval_dataset()
    if dataset is not None:
        check_dataset(dataset, "eval_dataset")
    return dataset


def _asks_for_evaluation(config: Config) -> str | None:
    """A config key that has no effect without evaluation data."""
    evaluate = config.evaluate
    asked = {
        "early_stop": config.early_stop,
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "evaluate.every_steps": evaluate.every_steps,
        "evaluate.every_epochs": evaluate.every_epochs,
        "evaluate.at_start": evaluate.at_start,
    }
    return next((key for key, value in asked.items() if value), None)


@dataclass(frozen=True)
class TrainableModel:
    """A model with its optimiser, on its ranks."""

    strategy: Strategy
    ema: Ema | None
    summary: str
    """A table of its parameters."""


def build_trainable(
    loaded: LoadedConfig, task: Task, engine: Engine, choice: StrategyChoice, plan: BatchPlan
) -> TrainableModel:
    """The task's model with its initial weights, sharded as the strategy does; collective."""
    config = loaded.config
    if config.compile:
        origin = loaded.composed.origin("compile")
        check_compiler(engine.collectives, engine.device.type, origin)
    seed_everything(initial_seed(config.run.seed), engine.device)
    model, initial, converted = build_model(task, config.run.seed)
    check_parameters(model)
    check_modules(model, allocated=initial is None)
    check_memory(model)
    check_same_model(engine.collectives, model)
    in_evaluation = start_training(model)
    empty_to_buffers(model)
    summary = model_summary(model)
    if converted:
        summary += f"\n(converted to fp32, in which weights are trained: {listed(converted, 3)})"
    if in_evaluation:
        summary += f"\n(in evaluation mode, as built: {listed(in_evaluation, 3)})"
    if config.compile:
        model.compile()
    blocks = find_blocks(model, blocks_of(task, model), config.fsdp2.blocks)
    where = loaded.composed.origin("optim.groups")
    settings = parameter_settings(config.optim, model, blocks, where)
    if config.activation_checkpointing:
        if not blocks:
            raise UsageError(
                "activation_checkpointing is true, but the model has no blocks: no module list, "
                "none named by the task's blocks(model), none by fsdp2.blocks; name them, or set "
                "it to false."
            )
        checkpoint_activations(blocks)
    if initial and not choice.cls.shards_parameters:
        initial.fill(model, torch.device("cpu"))
        initial = None
    strategy = choice.cls(
        StrategySetup(
            engine=engine,
            name=choice.name,
            options=choice.options,
            precision=config.precision,
            optimizer_name=config.optim.use,
            optimizer_options=config.optim.options,
            plan=plan,
            blocks=blocks,
            initial=initial,
        )
    )
    origin = loaded.composed.origin("optim.use")
    strategy.check_optimizer(
        model, lambda example: build_optimizer(config.optim, example, origin=origin)
    )
    shared = SharedBuffers(model)
    strategy.prepare(model, lambda placed: build_optimizer(config.optim, placed, settings, origin))
    shared.share()
    check_extra_state(strategy.bare_model)
    return TrainableModel(strategy, Ema(config.ema, strategy) if config.ema else None, summary)


def build_evaluation_batches(
    config: Config,
    task: Task,
    dataset: Any,
    default_size: int,
    engine: Engine,
    *,
    most: int | None = None,
) -> Batches:
    """This rank's micro-batches of one pass over the evaluation data ``dataset``; their size is
    ``evaluate.micro_batch_size``, by default ``default_size``, that of training. ``most``: not more
    than this many."""
    micro_batch_size = config.evaluate.micro_batch_size or default_size
    samples, loader = len(dataset), config.loader
    if most:
        samples = min(samples, most * micro_batch_size * engine.world_size)
        # One worker where there are any: what a dataset opens when it is first read must not be
        # shared with the workers that are forked later.
        alone = {"workers": min(loader.workers, 1), "persistent_workers": False}
        loader = loader.model_copy(update=alone)
    return evaluation_batches(
        dataset,
        EvalPlan(samples, micro_batch_size, engine.world_size),
        engine.rank,
        seed=config.run.seed,
        collate=task.collate,
        config=loader,
        device_type=engine.device.type,
    )
