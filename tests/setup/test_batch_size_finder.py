"""The batch-size finder: the largest micro-batch size that fits, found by trials."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch

from tests.support.forked import run, run_ranks
from tests.support.lanes import thinned
from tests.support.ranks import on_ranks
from tests.support.runs import assert_same_bits, tensors
from train.exits import RetryError
from train.setup import batch_size_finder
from train.setup.batch_size_finder import BatchSizeFinder
from train.setup.trial_step import free_device_memory

SMALL = ["task.use=tests.faults.tasks:SmallMemory", "batch.try_out=true", "ema.decay=0.9"]
SMALL += ["length.steps=10"]


def kept(directory):
    (found,) = json.loads((directory / "micro_batches.json").read_text()).values()
    return found


@pytest.mark.parametrize(
    ("room", "largest", "tried"),
    [
        (12, 12, {"12": "fits"}),
        (5, 4, {"12": "too large", "6": "too large", "3": "fits", "4": "fits"}),
        (2, 2, {"12": "too large", "6": "too large", "3": "too large", "2": "fits"}),
    ],
)
def test_the_largest_size_that_fits_is_found_without_effect_on_the_run(
    tmp_path, room, largest, tried
):
    found = run("fit", tmp_path / "found", *SMALL, f"task.room={room}")
    assert f"micro-batch {largest} x accumulation {-(-12 // largest)} x" in found.stdout
    assert kept(tmp_path / "found") == tried
    run("fit", tmp_path / "told", *SMALL, f"task.room={room}", f"batch.micro_batch_size={largest}")
    assert_same_bits(tensors(tmp_path / "told"), tensors(tmp_path / "found"))


@pytest.mark.parametrize(
    "strategy", thinned(["ddp", "fsdp2", "zero1", "zero2", "zero3"], kept=["ddp"])
)
def test_on_two_ranks(tmp_path, strategy):
    """State that an out-of-memory error leaves behind, also in the strategy, has no effect on the
    run."""
    options = [*SMALL, f"strategy={strategy}", "task.room=2"]
    done = run_ranks(2, "fit", tmp_path / "found", *options)
    assert "micro-batch 2 x accumulation 3 x ranks 2 = global batch 12" in done[0].stdout
    run_ranks(2, "fit", tmp_path / "told", *options, "batch.micro_batch_size=2")
    assert_same_bits(tensors(tmp_path / "told"), tensors(tmp_path / "found"))


def test_a_size_must_fit_on_every_rank(tmp_path):
    done = run_ranks(2, "fit", tmp_path, *SMALL, "task.room=6", "task.room_of_rank_1=3")
    assert "micro-batch 3 x accumulation 2 x ranks 2 = global batch 12" in done[0].stdout


@pytest.mark.slow
def test_ranks_that_disagree_during_a_collective_restart(tmp_path):
    """Rank 0 waits in a collective that cannot be cancelled."""
    options = [*SMALL, "strategy=fsdp2", "task.room=6", "task.room_of_rank_1=3"]
    run_ranks(2, "fit", tmp_path, *options, "watchdog.first_timeout=6", expect=75)
    assert "trying micro-batches of 6" in (tmp_path / "hangs/attempt-1/report.txt").read_text()
    done = run_ranks(2, "fit", tmp_path, *options)
    assert "micro-batch 3 x accumulation 2 x ranks 2 = global batch 12" in done[0].stdout


def test_memory_for_collating_counts_and_evaluate_uses_what_fits(tmp_path):
    words = [*SMALL, "task.use=tests.faults.tasks:SmallCollate", "task.room=4"]
    run("fit", tmp_path, *words)
    assert kept(tmp_path)["4"] == "fits"
    assert kept(tmp_path)["6"] == "too large"
    finished = json.loads((tmp_path / "finished.json").read_text())
    evaluated = json.loads(run("evaluate", tmp_path, *words, "--json").stdout)
    assert evaluated["loss"] == finished["metrics"]["loss"]


def test_a_resumed_run_makes_no_trials(tmp_path):
    run("fit", tmp_path, *SMALL, "length.steps=10")
    before = (tmp_path / "micro_batches.json").stat().st_mtime_ns
    done = run("fit", tmp_path, *SMALL, "length.steps=20", "--allow-changes")
    assert "micro-batch 3 x accumulation 4" in done.stdout
    assert (tmp_path / "micro_batches.json").stat().st_mtime_ns == before


def test_a_size_whose_trial_ended_the_process_counts_as_too_large(tmp_path):
    run("fit", tmp_path, *SMALL, "task.kill_above=6", expect=-signal.SIGKILL)
    run("fit", tmp_path, *SMALL, "task.kill_above=6")
    assert kept(tmp_path)["12"] == "too large"
    assert "did not end the last time" in (tmp_path / "logs/rank-0.log").read_text()


def test_an_error_is_reported_if_no_size_fits(tmp_path):
    done = run("fit", tmp_path, "task.use=tests.faults.tasks:TooLarge", "batch.try_out=true",
               expect=71)  # fmt: skip
    assert "Out of memory with one sample per rank and micro-batch" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_out_of_memory_error_of_the_allocator(tmp_path):
    """Raised by the allocator, not by the task."""
    done = run("fit", tmp_path, "task.use=tests.faults.tasks:Hungry", "batch.try_out=true")
    assert "micro-batch 6 x accumulation 2" in done.stdout
    assert torch.isfinite(tensors(tmp_path)["model.0.weight"]).all()


@pytest.mark.parametrize("in_step", [True, False])
def test_ranks_that_ran_out_of_memory_at_different_collectives_do_not_go_on(
    tmp_path, monkeypatch, in_step
):
    """One has started an all-reduce more, which would be taken for one of the next trial."""
    numbers = [[7, 3], [7, 3] if in_step else [6, 3]]
    tried = []

    def check(collectives):
        finder = object.__new__(BatchSizeFinder)
        rank = collectives.rank
        finder._engine = SimpleNamespace(world_size=2, is_main=rank == 0)
        finder._results, finder._path = {"6": "begun"}, tmp_path / "micro_batches.json"
        finder._kept = {"key": finder._results}
        tried.append(finder)
        monkeypatch.setattr(batch_size_finder, "collectives_called", lambda: numbers[rank])
        finder._check_in_step(collectives, 6)

    errors = on_ranks(2, check)
    if in_step:
        assert errors == [None, None]
        return
    for error in errors:
        assert isinstance(error, RetryError)
        assert "Micro-batches of 6 samples do not fit" in str(error)
    assert [finder._results["6"] for finder in tried] == ["too large"] * 2
    assert kept(tmp_path)["6"] == "too large", "the next start tries smaller ones"


def test_the_peak_of_a_trial_is_not_that_of_the_run(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", called.append)
    free_device_memory(torch.device("cpu"))
    assert called == []
    free_device_memory(torch.device("cuda", 3))
    assert called == ["empty", torch.device("cuda", 3)]
