"""I1 for each optimiser that has a name: sharded parameters are updated as whole ones."""

import pytest

from tests.invariants.test_odd_models import assert_same_run
from tests.support.forked import run, run_ranks
from tests.support.lanes import thinned
from train.optim.optim_config import NAMES

BASE = [
    "batch.micro_batch_size=6", "length.steps=6", "checkpoint.every_steps=6",
    "optim.weight_decay=0.01", "optim.betas=null",
]  # fmt: skip
MOMENTUM = ("sgd", "rmsprop")


@pytest.mark.parametrize(
    "use", thinned(sorted(NAMES.keys() - {"adafactor"}), kept=["sgd", "adagrad"])
)
def test_fsdp2_trains_as_one_process(tmp_path, use):
    """Adafactor is refused there: it factors whole parameters."""
    words = [*BASE, f"optim.use={use}", *(["optim.momentum=0.9"] if use in MOMENTUM else [])]
    run("fit", tmp_path / "one", *words)
    run_ranks(2, "fit", tmp_path / "two", *words, "strategy=fsdp2")
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_an_optimiser_that_cannot_be_fused_over_shards_is_refused(tmp_path):
    words = [*BASE, "optim.use=sgd", "optim.options.fused=true", "strategy=fsdp2"]
    for done in run_ranks(2, "fit", tmp_path, *words, expect=64):
        assert "optim.options.fused is true, but torch's fused SGD does not" in done.stderr
