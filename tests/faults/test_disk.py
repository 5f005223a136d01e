"""A disk that is full or read-only."""

import pytest

from tests.faults.mounts import fill, read_only, resize, small_disk
from tests.support.forked import Command, run, start, wait_for
from tests.support.runs import assert_same_bits, checkpoints, curve, metrics, tensors

# 31 thousand parameters: a checkpoint takes about 380 KB.
WIDE = ["model.hidden=2048", "checkpoint.every_steps=10", "evaluate.every_steps=10"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run("fit", directory, *WIDE)
    return directory


def assert_as_undisturbed(undisturbed, directory):
    assert_same_bits(tensors(undisturbed), tensors(directory))
    for key in ("train/loss", "train/gradient_norm", "eval/loss"):
        assert curve(directory, key) == curve(undisturbed, key)
    steps = [row["step"] for row in metrics(directory)]
    assert steps == sorted(set(steps)), "a step is missing or repeated"
    assert "all well" in run("verify", directory).stdout
    assert not [p for p in (directory / "checkpoints").iterdir() if p.name.startswith(".")]


def test_a_full_disk_is_reported_and_the_run_resumes_with_more_space(undisturbed, tmp_path):
    """There is space for two checkpoints, but the third is written before the first is removed."""
    with small_disk(tmp_path / "disk", "size=1000k") as disk:
        directory = disk / "run"
        done = run("fit", directory, *WIDE, expect=75)
        assert "warning: A checkpoint could not be written (" in done.stderr
        assert "No space left on device" in done.stderr
        assert "Training continues" in done.stderr
        assert "free some space, then rerun" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert "step 40/40" in done.stdout, "training must continue"
        assert checkpoints(directory) == [10, 20]
        assert "all well" in run("verify", directory).stdout, "the older checkpoints must be valid"
        resize(disk, "8m")
        done = run("fit", directory, *WIDE)
        assert "resumes at step 20" in done.stdout
        assert_as_undisturbed(undisturbed, directory)


@pytest.mark.slow
def test_with_on_error_stop_a_full_disk_ends_the_run(undisturbed, tmp_path):
    with small_disk(tmp_path / "disk", "size=1000k") as disk:
        directory, rule = disk / "run", "checkpoint.on_error=stop"
        done = run("fit", directory, *WIDE, rule, "task.sleep=0.02", expect=75)
        (line,) = done.stderr.splitlines()
        assert "No space left on device" in line
        assert "checkpoint.on_error is stop" in line
        assert "step 38/40" not in done.stdout, "the run must end before the next checkpoint"
        assert checkpoints(directory) == [10, 20]
        resize(disk, "8m")
        run("fit", directory, *WIDE, rule)
        assert_as_undisturbed(undisturbed, directory)


@pytest.mark.slow
def test_a_run_completes_if_space_is_freed_in_time(undisturbed, tmp_path):
    """On a full disk not even a line of metrics can be written; once space is free, the run writes
    what it has kept in memory."""
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        directory = disk / "run"
        process = start("fit", directory, *WIDE, "task.sleep=0.05")
        wait_for(process, lambda: checkpoints(directory) == [10])
        filler = fill(disk)
        wait_for(process, lambda: "could not be written" in process.stderr())
        wait_for(process, lambda: "metrics.jsonl" in process.stderr())
        filler.unlink()
        done = process.wait()
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert_as_undisturbed(undisturbed, directory)


def test_a_run_that_starts_on_a_full_disk_exits_with_75(undisturbed, tmp_path):
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        directory = disk / "run"
        run("fit", directory, *WIDE, "task.kill_at_step=25", "task.sleep=0.02", expect=-9)
        filler = fill(disk)
        done = run("fit", directory, *WIDE, expect=75)
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        filler.unlink()
        run("fit", directory, *WIDE)
        assert_as_undisturbed(undisturbed, directory)


def test_a_disk_without_space_for_a_directory(tmp_path):
    with small_disk(tmp_path / "disk", "size=1m,nr_inodes=1") as disk:
        (line,) = run("fit", disk / "run", expect=75).stderr.splitlines()
        assert "No space left on device" in line
        assert "free some space" in line


@pytest.mark.slow
def test_a_read_only_run_directory(tmp_path):
    directory = tmp_path / "run"
    run("fit", directory, "task.kill_at_step=25", "checkpoint.every_steps=10", expect=-9)
    with read_only(directory):
        (line,) = run("fit", directory, expect=64).stderr.splitlines()
        assert f"run.dir is {str(directory)!r} (from command line)" in line
        assert "Read-only file system" in line
        # Commands that only read still work.
        assert "all well" in run("verify", directory).stdout
        assert "on 37 samples" in run("evaluate", directory).stdout
        (line,) = run("export", directory, expect=64).stderr.splitlines()
        assert "Read-only file system" in line
        run("export", directory, "--to", tmp_path / "elsewhere")
    run("fit", directory, "checkpoint.every_steps=10")


def test_a_read_only_parent_directory(tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    with read_only(parent):
        (line,) = run("fit", parent / "a/b", expect=64).stderr.splitlines()
        assert f"{parent} is not writable" in line


def test_a_new_project_on_a_read_only_disk(tmp_path):
    with read_only(tmp_path):
        done = Command("new", tmp_path / "mine").wait()
        assert done.returncode == 64
        assert "Read-only file system" in done.stderr
