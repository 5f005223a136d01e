"""I1, I2 and I3 with every strategy: the same ledger, the same curve, and checkpoints that do not
depend on the placement that wrote them.
"""

import itertools
import json
import shutil

import pytest
import torch

from tests.support.forked import run, run_ranks
from tests.support.lanes import thinned
from tests.support.runs import assert_same_bits, checkpoints, tensors
from train.data.ledger import read_steps
from train.parity.compare import curve, largest_difference

STRATEGIES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
# The same micro-batches on every placement, so that even dropout is the same.
BASE = ["batch.micro_batch_size=3", "optim.weight_decay=0.1", "ema.decay=0.9", "length.steps=30"]
BASE += ["checkpoint.keep_last=9", "checkpoint.every_steps=15", "evaluate.every_steps=15"]
BASE += ["optim.groups=[{pattern: '4.*', lr_factor: 0.5, weight_decay: 0.2, betas: [0.8, 0.9]}]"]
MIDDLE, END = 15, 30


def placed(placement, directory, *overrides, **kwargs):
    """Runs on a placement such as ``2 fsdp2``, or ``1`` for one process."""
    count, _, strategy = placement.partition(" ")
    if count == "1" and not strategy:
        return run("fit", directory, *BASE, *overrides, **kwargs)
    return run_ranks(
        int(count), "fit", directory, *BASE, f"strategy={strategy}", *overrides, **kwargs
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    placed("1", directory)
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns a function that gives the run on a placement; each runs once."""
    made = {}

    def of(placement):
        if placement not in made:
            made[placement] = tmp_path_factory.mktemp(placement.replace(" ", "-"))
            placed(placement, made[placement])
        return made[placement]

    return of


def assert_same_run(one, other, *, steps=END):
    assert read_steps(one / "ledger.bin") == read_steps(other / "ledger.bin")
    for key in ("train/loss", "train/gradient_norm", "train/learning_rate", "eval/loss"):
        assert largest_difference(curve(one, key), curve(other, key)) <= 1e-5, key
    assert len(curve(other, "train/loss")) == steps
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.shape == found[name].shape
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


PLACEMENTS = [f"2 {strategy}" for strategy in STRATEGIES]
PLACEMENTS += ["1 fsdp2", "1 zero2", "4 ddp", "4 fsdp2"]


@pytest.mark.parametrize("placement", thinned(PLACEMENTS, kept=lambda p: p[0] == "2"))
def test_every_placement_gives_the_same_run(alone, finished, placement):
    assert_same_run(alone, finished(placement))


UNEVEN = ["batch.global_batch_size=11", "model.dropout=0.0"]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uneven")
    placed("1", directory, *UNEVEN, "batch.micro_batch_size=11")
    return directory


@pytest.mark.parametrize(
    "placement",
    thinned(
        ["1", "3 ddp", "2 fsdp2", "3 fsdp2", "2 zero1", "3 zero3"],
        kept=["3 fsdp2"],
    ),
)
def test_uneven_micro_batches(uneven, tmp_path, placement):
    """11 samples on several ranks, with different token counts. No dropout, as its masks would
    differ."""
    placed(placement, tmp_path, *UNEVEN)
    assert_same_run(uneven, tmp_path)


ANYWHERE = ["1", *PLACEMENTS[:5]]
# Each placement before or after another one.
PAIRED = [(ANYWHERE[at], ANYWHERE[at + 1]) for at in range(0, len(ANYWHERE), 2)]


@pytest.mark.parametrize(
    ("before", "after"), thinned(list(itertools.product(ANYWHERE, ANYWHERE)), kept=PAIRED)
)
def test_a_checkpoint_resumes_on_any_placement(alone, finished, tmp_path, before, after):
    """In the middle of an epoch, with averaged weights (EMA) and Adam's state."""
    moved = interrupted(finished(before), tmp_path / "moved")
    placed(after, moved)
    assert (
        json.loads((moved / "attempts.jsonl").read_text().splitlines()[-1])["resumed_from_step"]
        == MIDDLE
    )
    assert_same_run(alone, moved)
    if before == after:
        assert_same_bits(tensors(finished(before)), tensors(moved))


@pytest.mark.parametrize(
    ("before", "after"),
    thinned(
        [
            ("2 fsdp2", "4 fsdp2"),
            ("4 fsdp2", "2 zero3"),
            ("2 zero3", "4 ddp"),
            ("4 ddp", "1 zero2"),
        ],
        kept=[("2 zero3", "4 ddp")],
    ),
)
def test_a_checkpoint_resumes_on_another_number_of_ranks(alone, finished, tmp_path, before, after):
    moved = interrupted(finished(before), tmp_path / "moved")
    placed(after, moved)
    assert_same_run(alone, moved)


@pytest.mark.slow
def test_a_run_moves_to_three_ranks_and_back(tmp_path):
    """Three ranks split a step into other micro-batches, so there is no dropout."""
    still = "model.dropout=0.0"
    placed("1", tmp_path / "alone", still)
    placed("2 zero2", tmp_path / "0", still)
    for number, after in enumerate(["3 fsdp2", "2 ddp", "3 zero3", "4 zero1"]):
        moved = interrupted(tmp_path / str(number), tmp_path / str(number + 1))
        placed(after, moved, still)
        assert_same_run(tmp_path / "alone", moved)


def interrupted(directory, copy):
    """A copy of a finished run, reset to the middle."""
    shutil.copytree(directory, copy)
    (copy / "finished.json").unlink()
    for step in checkpoints(copy):
        if step > MIDDLE:
            shutil.rmtree(copy / f"checkpoints/step-{step:012d}")
    return copy


SKIPPING = ["task.nan_at_steps=[3, 7]", "batch.micro_batch_size=auto", "model.dropout=0.0"]


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    directory = tmp_path_factory.mktemp("skipping")
    placed("1", directory, *SKIPPING)
    return directory


@pytest.mark.parametrize("placement", thinned(PLACEMENTS[:5], kept=["2 zero3"]))
def test_a_skipped_step_is_skipped_on_every_placement(skipping, tmp_path, placement):
    placed(placement, tmp_path, *SKIPPING)
    assert max(curve(tmp_path, "train/skipped_steps").values()) == 2
    assert_same_run(skipping, tmp_path)


BF16 = ["precision=bf16", "model.dropout=0.0"]


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bf16")
    placed("1", directory, *BF16)
    return directory


@pytest.mark.parametrize("placement", thinned(PLACEMENTS[:5], kept=["2 fsdp2"]))
def test_bf16_curves_agree_within_its_precision(in_bf16, tmp_path, placement):
    placed(placement, tmp_path, *BF16)
    expected, found = (curve(directory, "train/loss") for directory in (in_bf16, tmp_path))
    assert largest_difference(expected, found) <= 0.05
