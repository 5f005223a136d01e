"""One of several ranks fails: the others do not hang and do not hide the cause."""

import itertools
import signal

import pytest
import torch

from tests.support.forked import run, run_ranks, start, start_ranks, wait_for
from tests.support.lanes import slow, thinned
from tests.support.runs import assert_same_bits, checkpoints, curve, tensors

TASKS = "tests.faults.tasks"


def test_the_other_ranks_exit_with_75_when_a_rank_is_lost(tmp_path):
    ranks = start_ranks(2, "fit", tmp_path, "task.sleep=0.05", "checkpoint.every_steps=5")
    wait_for(ranks[0], lambda: checkpoints(tmp_path))
    ranks[1].signal(signal.SIGKILL)
    done = ranks[0].wait()
    assert done.returncode == 75
    assert "isorun: error: Another rank has ended or cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert ranks[1].wait().returncode == -signal.SIGKILL
    assert "Another rank has ended" in (tmp_path / "logs/rank-0.log").read_text()
    run_ranks(2, "fit", tmp_path)


def test_the_failed_rank_reports_the_cause_and_the_others_its_loss(tmp_path):
    done = run_ranks(2, "fit", tmp_path, "data.fail_at=50", expect=None)
    codes = sorted(result.returncode for result in done)
    assert codes == [65, 75]
    (why,) = [result.stderr for result in done if result.returncode == 65]
    assert "this sample is broken" in why
    (that,) = [result.stderr for result in done if result.returncode == 75]
    assert "Another rank has ended" in that
    assert "Traceback" not in that


@pytest.mark.slow
def test_a_rank_that_fails_during_an_exchange_ends(tmp_path):
    """The end of the exchange and that of the process group once waited for each other."""
    ranks = start_ranks(2, "fit", tmp_path, f"task.use={TASKS}:FailsInBackward", "strategy=ddp")
    done = [rank.wait(60) for rank in ranks]
    assert done[0].returncode == 70, done[0].stderr
    assert "this gradient is broken" in done[0].stderr
    assert done[1].returncode == 75, done[1].stderr


def test_all_ranks_refuse_a_directory_that_is_in_use(tmp_path):
    first = start("fit", tmp_path, "task.sleep=0.2")
    wait_for(first, (tmp_path / "ledger.bin").exists)
    for done in run_ranks(2, "fit", tmp_path, expect=76):
        assert f"is in use by process {first.pid} on" in done.stderr
    first.signal(signal.SIGTERM)
    assert first.wait().returncode == 143


@pytest.mark.slow
def test_a_rank_lost_during_the_last_save_leaves_no_finished_run(tmp_path):
    """The save was not committed, so the run is not complete."""
    task = [f"task.use={TASKS}:DiesInSave", "length.steps=10"]
    ranks = start_ranks(2, "fit", tmp_path, *task)
    assert ranks[1].wait().returncode == -signal.SIGKILL
    done = ranks[0].wait()
    assert done.returncode == 75, done.stderr
    assert "checkpoint could not be written" in done.stdout + done.stderr
    assert not (tmp_path / "finished.json").exists()
    assert checkpoints(tmp_path) == []
    run_ranks(2, "fit", tmp_path, *task)
    assert checkpoints(tmp_path) == [10]


def test_buffers_that_differ_between_ranks_resume_bitwise_equal(tmp_path):
    """Each rank has its own BatchNorm statistics; those of rank 0 are saved."""
    base = [f"task.use={TASKS}:WithBatchNorm", "checkpoint.every_steps=10", "length.steps=30"]
    base += ["checkpoint.keep_last=9", "model.dropout=0.0"]
    run_ranks(2, "fit", tmp_path / "one", *base)
    done = run_ranks(2, "fit", tmp_path / "two", *base, "task.kill_at_step=25", expect=None)
    assert any(result.returncode == -signal.SIGKILL for result in done)
    run_ranks(2, "fit", tmp_path / "two", *base)
    assert_same_bits(tensors(tmp_path / "one", 20), tensors(tmp_path / "two", 20))
    assert_same_bits(tensors(tmp_path / "one"), tensors(tmp_path / "two"))


@pytest.mark.parametrize(
    ("strategy", "forward_pass"),
    thinned(
        list(itertools.product(["ddp", "fsdp2", "zero3"], [9, 10])),
        kept=[("ddp", 9)],
    ),
)
def test_an_abandoned_step_has_no_effect(tmp_path, strategy, forward_pass):
    """The 9th forward pass is between two micro-batches, the 10th before a step. It changes the
    BatchNorm statistics and may gather parameters."""
    base = [f"task.use={TASKS}:WithBatchNorm", "batch.micro_batch_size=3", "length.steps=8"]
    base += [f"strategy={strategy}", "model.dropout=0.0"]
    run_ranks(2, "fit", tmp_path / "one", *base)
    run_ranks(2, "fit", tmp_path / "two", *base, f"task.stop_rank_1_at={forward_pass}", expect=143)
    run_ranks(2, "fit", tmp_path / "two", *base)
    assert_same_bits(tensors(tmp_path / "one"), tensors(tmp_path / "two"))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        slow(("train", "train_dataset() has 60 samples on rank 1")),
        ("eval", "eval_dataset() has 36 samples on rank 1"),
        slow(("model", "0.weight of rank 1")),
    ],
)
def test_ranks_that_build_something_else_are_refused(tmp_path, odd, message):
    task = ["task.use=tests.support.uneven:OddRankTask", f"task.odd={odd}", "strategy=fsdp2"]
    for done in run_ranks(2, "fit", tmp_path, *task, expect=64):
        assert message in done.stderr


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_unused_parameters_are_named(tmp_path, strategy):
    done = run_ranks(
        2, "fit", tmp_path, f"task.use={TASKS}:UnusedParameter", f"strategy={strategy}", expect=64
    )
    assert "idle got no gradient" in done[0].stderr
    assert "Traceback" not in done[0].stderr


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [(1, "auto"), (2, "ddp"), slow((2, "fsdp2")), slow((2, "zero1")), slow((2, "zero3"))],
)
def test_a_loss_that_uses_no_parameter_is_refused(tmp_path, ranks, strategy):
    words = [f"task.use={TASKS}:UsesNothing", f"strategy={strategy}"]
    for done in run_ranks(ranks, "fit", tmp_path, *words, expect=64):
        assert "no trainable parameter" in done.stderr or "got no gradient" in done.stderr


@pytest.mark.parametrize("option", ["strategy=ddp", slow("strategy=fsdp2")])
def test_unused_parameters_stay_unchanged_with_strategies_that_allow_them(tmp_path, option):
    task = [f"task.use={TASKS}:UnusedParameter", "optim.weight_decay=0.1"]
    run("fit", tmp_path / "one", *task, "batch.micro_batch_size=6")
    run_ranks(2, "fit", tmp_path / "two", *task, option)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert "optim.idle.exp_avg" not in one
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_evaluation_data_may_have_fewer_samples_than_there_are_ranks(tmp_path):
    task = [f"task.use={TASKS}:WithTorchmetrics", "data.eval_size=2", "length.steps=6"]
    run_ranks(3, "fit", tmp_path, *task)
    expected = curve(tmp_path, "eval/by_hand")
    assert curve(tmp_path, "eval/mse") == pytest.approx(expected, rel=1e-5)
