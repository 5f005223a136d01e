"""``isorun batch-size``: what micro-batches of different sizes need."""

import json
import os

import pytest

from tests.support.forked import run, run_ranks

SMALL = ["task.use=tests.faults.tasks:SmallMemory", "model.hidden=64"]
LARGE = [*SMALL, "task.room=99"]


def batch_size(directory, *words):
    found = json.loads(run("batch-size", directory, *words, "--json").stdout)["placements"]
    assert not os.path.lexists(directory)  # no trace
    return found


def test_all_sizes_are_tried_up_to_the_share_of_a_rank(tmp_path):
    (found,) = batch_size(tmp_path / "run", *LARGE)
    sizes = found["sizes"]
    assert [(s["micro_batch_size"], s["accumulation"]) for s in sizes] == [
        (1, 12), (2, 6), (3, 4), (6, 2), (12, 1),
    ]  # fmt: skip
    assert all(s["fits"] and s["samples_per_second"] > 0 and s["memory"] > 0 for s in sizes)
    assert (found["placement"], found["largest"]) == ("1:single", 12)
    assert found["fastest"] in (6, 12)


def test_sizes_that_do_not_fit_are_named(tmp_path):
    done = run("batch-size", tmp_path / "run", *SMALL, "task.room=4")
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("1:single ")]
    assert [row[1] for row in rows] == ["1", "2", "3", "4", "6"]
    assert rows[-1][3:] == ["out", "of", "memory"]
    assert "1:single: the fastest is batch.micro_batch_size=" in done.stdout


def test_no_more_than_asked_for_is_tried(tmp_path):
    (found,) = batch_size(tmp_path / "run", *LARGE, "--up-to", "3")
    assert [s["micro_batch_size"] for s in found["sizes"]] == [1, 2, 3]


def test_ranks_agree_on_the_sizes(tmp_path):
    words = [*SMALL, "task.room=6", "task.room_of_rank_1=3", "strategy=ddp", "--json"]
    done = run_ranks(2, "batch-size", tmp_path / "run", *words)
    (found,) = json.loads(done[0].stdout)["placements"]
    assert [(s["micro_batch_size"], s["fits"]) for s in found["sizes"]] == [
        (1, True), (2, True), (3, True), (6, False),
    ]  # fmt: skip
    assert done[1].stdout == ""


@pytest.mark.slow
def test_placements_are_compared(tmp_path):
    found = batch_size(tmp_path / "run", *LARGE, "--on", "1", "--on", "2:ddp", "--up-to", "2")
    assert [of["placement"] for of in found] == ["1:single", "2:ddp"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--up-to", "0"], 64, "--up-to is 0"),
        (["--on", "two"], 64, "'two' is not a placement"),
        (["task.use=tests.faults.tasks:TooLarge"], 71, "Out of memory with one sample"),
    ],
)
def test_errors_are_one_sentence(tmp_path, words, code, text):
    done = run("batch-size", tmp_path / "run", *words, expect=code)
    assert text in done.stderr
    assert "Traceback" not in done.stderr
