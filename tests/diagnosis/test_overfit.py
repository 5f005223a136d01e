"""``isorun overfit`` on a task that learns, and on tasks that are broken on purpose."""

import json
import os

import pytest

from tests.support.forked import run, run_ranks
from train.exits import Exit

BASE = [
    "task.use=tests.support.broken:BrokenTask", "batch.global_batch_size=16", "length.steps=10",
    "optim.lr=0.01",
]  # fmt: skip


def overfit(directory, *words, expect):
    done = run("overfit", directory, *words, "--json", expect=expect, base=BASE)
    assert not os.path.lexists(directory)  # no trace of the trial
    return json.loads(done.stdout)


def test_a_task_that_works_learns_one_batch(tmp_path):
    done = run("overfit", tmp_path / "run", base=BASE)
    assert "learnt: the loss on one batch fell from" in done.stdout
    assert "2.weight" in done.stdout  # the norms of all parameters
    assert not os.path.lexists(tmp_path / "run")


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("saturated", Exit.DATA, "Gradients vanish in deep.0.weight"),
        ("aside", Exit.DATA, "never move: aside.weight, aside.bias"),
        ("dead", Exit.DATA, "the output of 1 (ReLU) is 0 for every sample"),
        ("blind", Exit.DATA, "ignores the input: 0 (Linear) returns the same"),
        ("functional_dead", Exit.DATA, "The input of head (Linear) is 0 for every"),
        ("constant", Exit.DATA, "The input of trunk (Linear) is the same for all"),
        ("contradicting", Exit.DATA, "the labels do not fit the loss"),
        ("detached", Exit.DATA, "No parameter has changed"),
        ("rising", Exit.DATA, "does not fall below its first value"),
        ("infinite", Exit.NOT_FINITE, "The loss is inf in step 1."),
        ("root", Exit.NOT_FINITE, "look at the loss itself"),
        ("logarithm", Exit.NOT_FINITE, "that of head (Linear), whose input is not finite already."),
        ("division", Exit.NOT_FINITE, "first output that is not finite is that of 2 (Linear)"),
    ],
)
def test_what_is_in_the_way_is_named(tmp_path, how, code, text):
    result = overfit(tmp_path / "run", f"task.how={how}", "--steps", "60", expect=code)
    assert result["learnt"] is False
    assert text in " ".join(result["findings"])


def test_what_has_no_part_in_a_batch_that_is_learnt_is_named(tmp_path):
    result = overfit(tmp_path / "run", "task.how=detached_trunk", expect=Exit.DONE)
    assert result["learnt"] is True
    assert "2 of 4 parameters never move: trunk.weight, trunk.bias" in " ".join(result["findings"])


def test_a_rate_that_is_too_small_or_too_large_is_told_from_a_broken_task(tmp_path):
    small = overfit(tmp_path / "run", "optim.lr=1e-5", "--steps", "30", expect=Exit.DATA)
    assert "The loss still falls" in small["findings"][0]
    large = overfit(tmp_path / "run", "optim.lr=3", "--steps", "30", expect=Exit.DATA)
    assert "lower optim.lr" in large["findings"][0].replace("Lower", "lower")


def test_two_ranks_find_what_one_process_finds(tmp_path):
    words = ["--json", "--steps", "5", "strategy=fsdp2"]
    alone = overfit(tmp_path / "run", "--steps", "5", expect=Exit.DATA)
    main, other = run_ranks(2, "overfit", tmp_path / "run", *words, base=BASE, expect=Exit.DATA)
    assert json.loads(main.stdout)["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert other.stdout == ""


@pytest.mark.parametrize(
    ("words", "text"), [(["--steps", "1"], "--steps is 1"), (["--ratio", "1.5"], "--ratio is 1.5")]
)
def test_arguments_out_of_range_are_refused(tmp_path, words, text):
    done = run("overfit", tmp_path, *words, base=BASE, expect=Exit.USAGE)
    assert text in done.stderr
