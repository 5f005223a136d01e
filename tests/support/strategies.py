"""An engine and a strategy in this process, without a run."""

from datetime import timedelta

from tests.support.runs import tiny_config
from train.data.plan import BatchPlan
from train.distributed.world import World
from train.strategies.base import StrategySetup
from train.strategies.engine import Engine
from train.strategies.single import SingleStrategy

ALONE = World(0, 1, 0, 1, "python", "here")


def engine(world=ALONE, precision="fp32"):
    return Engine(
        world, precision=precision, deterministic=False, distributed=False,
        timeout=timedelta(seconds=60),
    )  # fmt: skip


def single(model, build_optimizer, kind=SingleStrategy, options=None):
    """A model on one process, with its optimiser."""
    setup = StrategySetup(
        engine=engine(), name="single", options=options, precision="fp32", optimizer_name="adamw",
        plan=BatchPlan.from_config(tiny_config().batch, 1), blocks=[],
    )  # fmt: skip
    strategy = kind(setup)
    strategy.prepare(model, build_optimizer)
    return strategy
