"""The run directory is moved, replaced or removed while the run trains."""

import os
import shutil
from pathlib import Path

import pytest

from tests.support.forked import run, run_ranks
from tests.support.lanes import slow
from tests.support.runs import assert_same_bits, checkpoints, curve, tensors
from tests.support.tiny import TinyTask
from train.checkpoint.run_directory import RunDirectory
from train.exits import ResumeRefusedError, RetryError
from train.process.watchdog import Watchdog, WatchdogConfig
from train.section import non_semantic

ROWS = ["track.log_every_steps=1", "checkpoint.every_steps=10", "checkpoint.asynchronous=false"]
SAVES = ["track.log_every_steps=1000", *ROWS[1:]]
EVALUATIONS = [
    "track.log_every_steps=1000", "checkpoint.every_steps=39", "evaluate.every_steps=10",
]  # fmt: skip


def rename(directory):
    directory.rename(aside(directory))


def remove(directory):
    shutil.rmtree(directory)


def replace_by_an_empty_one(directory):
    rename(directory)
    directory.mkdir()


def replace_by_a_copy(directory):
    rename(directory)
    shutil.copytree(aside(directory), directory)


def remove_the_lock(directory):
    (directory / "lock").unlink()


def aside(directory):
    return directory.with_name("aside")


class Moved(TinyTask):
    class Options(TinyTask.Options):
        move: str = non_semantic("")
        """What is done with the run directory before the forward pass of step 15."""

    def misbehave(self):
        self.calls += 1
        directory = Path(self.config.run.dir)
        if self.calls != 15 or os.environ.get("RANK", "0") != "0":
            return
        if self.config.task.move and not aside(directory).exists():
            globals()[self.config.task.move](directory)


TASK = ["task.use=tests.faults.test_moved_run:Moved"]


class MovedInSave(TinyTask):
    """Moves the run directory between the files of a checkpoint and its commit, and reads it in
    each step."""

    class Options(Moved.Options):
        pass

    def misbehave(self):
        from train.checkpoint import saver

        super().misbehave()
        if self.calls == 1:
            hash_file = saver.hash_file

            def hash_moved(path):
                directory = Path(self.config.run.dir)
                is_second = (directory / "checkpoints" / "step-000000000005").exists()
                if is_second and self.config.task.move and not aside(directory).exists():
                    globals()[self.config.task.move](directory)
                return hash_file(path)

            saver.hash_file = hash_moved


@pytest.mark.parametrize("move", [slow(rename), replace_by_a_copy])
def test_a_run_that_is_moved_during_a_save_ends_and_loses_nothing(tmp_path, move):
    directory, task = tmp_path / "run", "task.use=tests.faults.test_moved_run:MovedInSave"
    options = [task, *SAVES[:2], "checkpoint.every_steps=5", "length.steps=20"]
    done = run("fit", directory, *options, f"task.move={move.__name__}", expect=75)
    assert f"The run directory {directory} was moved, replaced or removed" in done.stderr
    assert "Traceback" not in done.stderr
    if move is replace_by_a_copy:
        assert checkpoints(directory) == [5], "it must not be committed there"
        assert len(list((directory / "checkpoints").glob(".*"))) == 1, "nor anything removed"
    else:
        assert not directory.exists()
    run("fit", aside(directory), *options)
    assert "all well" in run("verify", aside(directory), *options).stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run("fit", directory, *TASK, *ROWS)
    return directory


def content(directory):
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("options", "move"),
    [
        slow((ROWS, rename)),
        slow((ROWS, replace_by_a_copy)),
        (SAVES, replace_by_a_copy),
        slow((SAVES, rename)),
        slow((SAVES, replace_by_an_empty_one)),
        (EVALUATIONS, replace_by_an_empty_one),
    ],
)
def test_a_moved_run_ends_and_resumes_where_it_is(undisturbed, tmp_path, options, move):
    directory = tmp_path / "run"
    done = run("fit", directory, *TASK, *options, f"task.move={move.__name__}", expect=75)
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert f"The run directory {directory} was moved, replaced or removed" in line
    assert "Traceback" not in done.stderr
    if move is rename:
        assert not directory.exists()
    elif move is replace_by_an_empty_one:
        assert content(directory) == {}
    else:
        before = RunDirectory(directory)
        assert checkpoints(directory) == [10]
        assert before.attempts.count() == 1
        assert "ended" not in before.attempts.last()
    run("fit", aside(directory), *TASK, *ROWS)
    assert_same_bits(tensors(undisturbed), tensors(aside(directory)))
    if options is ROWS:
        assert curve(undisturbed) == curve(aside(directory))
    assert "all well" in run("verify", aside(directory), *TASK).stdout


@pytest.mark.parametrize(("options", "move"), [(ROWS, remove), slow((SAVES, remove))])
def test_a_removed_run_is_not_made_again(tmp_path, options, move):
    done = run("fit", tmp_path / "run", *TASK, *options, f"task.move={move.__name__}", expect=75)
    assert "was moved, replaced or removed" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_removed_lock_ends_the_run(tmp_path):
    """Another process could take a new one."""
    done = run("fit", tmp_path, *TASK, *SAVES, "task.move=remove_the_lock", expect=75)
    assert f"{tmp_path / 'lock'} was replaced or removed" in done.stderr
    assert checkpoints(tmp_path) == [10]


@pytest.mark.slow
def test_all_ranks_of_a_moved_run_end(tmp_path):
    run_ranks(2, "fit", tmp_path / "run", *TASK, *SAVES, "task.move=rename", expect=75)
    assert not (tmp_path / "run").exists()


def test_the_lock_is_that_of_the_directory_that_is_open(tmp_path):
    path = tmp_path / "run"
    held = RunDirectory(path)
    held.acquire()
    held.ensure_in_place()
    with pytest.raises(ResumeRefusedError, match="is in use by process"):
        RunDirectory(path).acquire()
    path.rename(tmp_path / "moved")
    with pytest.raises(RetryError, match="was moved"):
        held.ensure_in_place()
    for write in (held.mark_stopped, held.clear_finished, lambda: held.mark_finished({"step": 1})):
        with pytest.raises(RetryError, match="was moved"):
            write()
    assert not path.exists()
    with pytest.raises(ResumeRefusedError, match="is in use by process"):
        RunDirectory(tmp_path / "moved").acquire()
    (tmp_path / "moved").rename(path)
    held.ensure_in_place()
    held.release()
    RunDirectory(path).acquire()


def test_a_lock_file_that_is_replaced_while_it_is_taken_is_opened_again(tmp_path, monkeypatch):
    """Between the opening of the file and its lock."""
    import fcntl

    directory, real, replaced = RunDirectory(tmp_path), fcntl.flock, []

    def flock(file, operation):
        if not replaced:
            replaced.append(file.name)
            (tmp_path / "lock").unlink()
            (tmp_path / "lock").touch()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    directory.acquire()
    directory.ensure_in_place()
    assert replaced


def test_the_watchdog_leaves_the_heartbeats_of_a_new_directory_of_the_old_name(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    with Watchdog(WatchdogConfig(), path, rank=0, world_size=1, attempt=1):
        assert (path / "heartbeats/rank-0.json").exists()
        path.rename(tmp_path / "moved")
        (path / "heartbeats").mkdir(parents=True)
        (path / "heartbeats/rank-0.json").write_text("of another run")
    assert (path / "heartbeats/rank-0.json").read_text() == "of another run"
    assert list((tmp_path / "moved/heartbeats").iterdir()) == []
