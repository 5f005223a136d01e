"""A loss that is not finite: the step does not change the weights, and all ranks agree."""

import json

import pytest

from tests.support.forked import quick_run, run, run_ranks
from tests.support.lanes import thinned
from tests.support.runs import assert_same_bits, curve, metrics, state, tensors
from train.data.ledger_check import verify

EVERY_STEP = [
    "length.steps=8",
    "schedule.use=constant",
    "schedule.warmup_steps=0",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=99",
]


def finished(directory):
    return json.loads((directory / "finished.json").read_text())


@pytest.mark.parametrize(
    "optimizer",
    [
        ["optim.use=adamw", "ema.decay=0.5"],
        ["optim.use=adamw", "optim.options={fused: false}"],
        ["optim.use=sgd", "optim.momentum=0.9", "ema.decay=0.5"],
    ],
    ids=["fused", "host", "sgd"],
)
def test_a_step_that_is_not_finite_changes_neither_weights_nor_state(tmp_path, optimizer):
    """Weights, optimiser state (including Adam's step count) and averaged weights keep every
    bit."""
    run("fit", tmp_path, *EVERY_STEP, *optimizer, "task.nan_at_steps=[4,7]")
    for step in range(2, 9):
        before, after = tensors(tmp_path, step - 1), tensors(tmp_path, step)
        if step in (4, 7):
            assert_same_bits(before, after)
        else:
            changed = {name for name in after if not before[name].equal(after[name])}
            assert changed == set(after), "a finite step must change every tensor"
    assert finished(tmp_path)["skipped_steps"] == 2
    counted = curve(tmp_path, "train/skipped_steps")
    assert list(counted.values()) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [s for s, loss in curve(tmp_path).items() if loss is None] == [4, 7]
    assert verify(tmp_path / "ledger.bin", last_step=8).ok, "a skipped step must use its samples"


@pytest.mark.parametrize(
    "optimizer", [["optim.use=adamw"], ["optim.use=sgd", "optim.momentum=0.9"]]
)
def test_the_first_steps_can_be_skipped(tmp_path, optimizer):
    rules = ["evaluate.at_start=true", "evaluate.every_steps=1"]
    run("fit", tmp_path, *EVERY_STEP, *rules, *optimizer, "task.nan_at_steps=[1,2]")
    evaluated = list(curve(tmp_path, "eval/loss").values())
    assert evaluated[0] == evaluated[1] == evaluated[2] != evaluated[3]
    assert all(value == value for value in evaluated)


def test_up_to_max_skipped_steps_in_a_row_are_skipped(tmp_path):
    rules = ["optim.max_skipped_steps=3", "length.steps=12"]
    run("fit", tmp_path, *rules, "task.nan_at_steps=[2,3,4,6,7,8]")
    assert finished(tmp_path)["skipped_steps"] == 6


def test_a_run_in_which_no_step_was_taken_is_not_finished(tmp_path):
    """However short, and again when it is repeated."""
    short = ["length.steps=4", "schedule.warmup_steps=0", "task.nan_at_steps=[1,2,3,4]"]
    for _ in range(2):
        done = run("fit", tmp_path, *short, expect=78)
        assert (
            "was not finite in each of the 4 steps; the weights are still the init" in done.stderr
        )
        assert not (tmp_path / "finished.json").exists()


@pytest.mark.parametrize("log_every_steps", [1, 100])
def test_more_than_max_skipped_steps_in_a_row_end_the_run(tmp_path, log_every_steps):
    done = run(
        "fit", tmp_path, "optim.max_skipped_steps=3", "task.nan_at_steps=[3,6,7,8,9]",
        f"track.log_every_steps={log_every_steps}", "checkpoint.every_steps=6", expect=78,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert "not finite for more than 3 steps in a row, the last of them step 9" in line
    assert "optim.max_skipped_steps is 3" in line
    assert "lower optim.lr" in line
    assert not (tmp_path / "finished.json").exists()
    assert state(tmp_path)["progress"]["step"] == 6, "the last checkpoint must be kept"


def test_skipped_steps_in_a_row_are_counted_across_a_restart(tmp_path):
    """Steps 3 and 4 are in the checkpoint; 5 and 6 come after it."""
    rules = ["optim.max_skipped_steps=3", "checkpoint.every_steps=4"]
    rules += ["checkpoint.asynchronous=false"]  # so that it exists before the kill
    run("fit", tmp_path, *rules, "task.nan_at_steps=[3,4]", "task.kill_at_step=5", "task.sleep=0.05",
        expect=-9)  # fmt: skip
    assert state(tmp_path)["progress"]["skipped_in_a_row"] == 2
    done = run("fit", tmp_path, *rules, "task.nan_at_steps=[1,2]", expect=78)
    assert "the last of them step 6" in done.stderr


ONE_RANK = [
    "task.use=tests.faults.tasks:OneRankNan",
    "evaluate.every_steps=1",
    "batch.micro_batch_size=3",
]


def test_all_ranks_skip_a_step_that_is_not_finite_on_one(tmp_path):
    """NaN in rank 1's second micro-batch of step 3 and its first of step 6."""
    run_ranks(2, "fit", tmp_path / "two", *ONE_RANK, "length.steps=8", "task.nan_on_rank_1=[6,11]")
    assert finished(tmp_path / "two")["skipped_steps"] == 2
    of_rank_0, of_rank_1 = ((tmp_path / f"two/weights-of-rank-{r}").read_text() for r in (0, 1))
    assert of_rank_0 == of_rank_1
    # One process has four micro-batches in a step; NaN in the same two steps.
    run("fit", tmp_path / "one", *ONE_RANK, "length.steps=8", "task.nan_at_steps=[10,22]")
    one, two = (curve(tmp_path / name, "eval/loss") for name in ("one", "two"))
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert two[3] == two[2]
    assert two[6] == two[5]
    assert [r["step"] for r in metrics(tmp_path / "two") if r.get("train/loss", 0) is None] == [
        3,
        6,
    ]


@pytest.mark.parametrize(
    "options",
    thinned(
        [
            ["strategy=zero1"],
            ["strategy=zero3"],
            ["strategy=zero2", "zero.offload_optimizer=cpu"],
            ["strategy=zero3", "zero.offload_optimizer=cpu"],
            ["strategy=fsdp2", "fsdp2.cpu_offload=true"],
        ],
        kept=[["strategy=zero2", "zero.offload_optimizer=cpu"]],
    ),
    ids=" ".join,
)
def test_sharded_strategies_skip_a_step_whose_loss_alone_is_not_finite(tmp_path, options):
    """With offload, DeepSpeed does not look at the gradients that the optimiser gets, and they have
    padding, which no later step overwrites."""
    task = ["task.use=tests.faults.tasks:InfiniteLoss", "task.infinite_at_steps=[3]"]
    run_ranks(2, "fit", tmp_path, *EVERY_STEP, *task, *options, "task.nan_at_steps=[5]")
    assert finished(tmp_path)["skipped_steps"] == 2
    for step in range(2, 9):
        before, after = tensors(tmp_path, step - 1), tensors(tmp_path, step)
        if step in (3, 5):
            assert_same_bits(before, after)
        else:
            assert not before["model.0.weight"].equal(after["model.0.weight"])


def test_all_ranks_exit_with_the_same_code(tmp_path):
    rules = ["optim.max_skipped_steps=1", "task.nan_on_rank_1=[3,4,5,6]"]
    for rank in run_ranks(2, "fit", tmp_path, *ONE_RANK, *rules, expect=78):
        assert "the last of them step 3" in rank.stderr


def test_the_error_is_printed_under_torchrun(tmp_path):
    """torchrun replaces the exit code with 1, so only the sentence names the cause."""
    rules = ["optim.max_skipped_steps=0", "task.nan_on_rank_1=[4]"]
    done = quick_run("fit", tmp_path, *ONE_RANK, *rules, processes=2, expect=1)
    assert (
        "isorun: error: The loss or the gradient norm was not finite for more than 0" in done.stderr
    )


def test_a_step_without_targets_is_skipped(tmp_path):
    """All targets are masked, so the mean loss is undefined."""
    run("fit", tmp_path, "task.use=tests.faults.tasks:NothingToCount", "length.steps=10")
    skipped = curve(tmp_path, "train/skipped_steps")
    assert [skipped[step] for step in range(1, 6)] == [0, 0, 1, 1, 1]
    assert "all well" in run("verify", tmp_path).stdout
