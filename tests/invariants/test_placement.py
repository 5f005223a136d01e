"""I1 and I2: the same samples in the same order and the same curve, on one process and on two."""

import json

import pytest

from tests.support.forked import quick_run as run
from tests.support.lanes import slow
from tests.support.runs import assert_same_bits, curve, tensors
from train.data.ledger_check import verify

BASE = ["checkpoint.every_steps=20", "evaluate.every_steps=20", "model.dropout=0.3"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    run("fit", directory, *BASE, "batch.micro_batch_size=3")
    return directory


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        slow((2, ["batch.micro_batch_size=3"])),
        (2, ["batch.micro_batch_size=3", "loader.workers=1"]),
        slow((4, ["batch.micro_batch_size=3"])),
    ],
)
def test_the_same_curve_even_with_dropout(alone, tmp_path, processes, overrides):
    """The counts differ between ranks, and both the data and the model draw random numbers."""
    run("fit", tmp_path, *BASE, *overrides, processes=processes)
    for key in ("train/loss", "train/gradient_norm", "eval/loss"):
        one, other = curve(alone, key), curve(tmp_path, key)
        assert one.keys() == other.keys()
        assert list(other.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert (alone / "ledger.bin").exists()
    assert records(tmp_path) == records(alone)
    assert verify(tmp_path / "ledger.bin", last_step=40).ok


def test_uneven_shares_are_exact(tmp_path):
    """11 samples on two ranks in micro-batches of up to 2: sums and counts are exact for any
    sizes."""
    quiet = ["model.dropout=0.0", "batch.global_batch_size=11"]
    run("fit", tmp_path / "one", *quiet)
    run("fit", tmp_path / "two", *quiet, "batch.micro_batch_size=2", processes=2)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert records(tmp_path / "one") == records(tmp_path / "two")


def test_workers_do_not_change_the_run(alone, tmp_path):
    run("fit", tmp_path, *BASE, "batch.micro_batch_size=3", "loader.workers=2")
    assert_same_bits(tensors(alone), tensors(tmp_path))


def test_a_run_moves_from_one_process_to_two_and_back(alone, tmp_path):
    step = ["batch.micro_batch_size=3", "checkpoint.keep_last=9", "checkpoint.asynchronous=false"]
    step += ["checkpoint.every_steps=10"]
    run("fit", tmp_path, *BASE, *step, "task.kill_at_step=100", expect=-9)
    run("fit", tmp_path, *BASE, *step, processes=2)
    attempts = [json.loads(line) for line in (tmp_path / "attempts.jsonl").open()]
    assert [a["resumed_from_step"] for a in attempts] == [None, 20]
    one, other = curve(alone), curve(tmp_path)
    assert list(other.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert verify(tmp_path / "ledger.bin", last_step=40).ok
    assert "all well" in run("verify", tmp_path).stdout


def records(directory):
    """The ledger without its attempts: the samples of each step."""
    from train.data.ledger import read_steps

    return read_steps(directory / "ledger.bin")
