"""Directories where files should be, files where directories should be, links to nothing, and files
that may not be read: one sentence, never a traceback."""

import os
import shutil

import pytest

from tests.support.forked import run
from tests.support.lanes import slow
from tests.support.runs import checkpoints
from train.checkpoint.damage import refused_files, unusable
from train.exits import Exit, ResumeRefusedError

BASE = ["checkpoint.every_steps=10", "checkpoint.asynchronous=false"]


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("killed") / "run"
    run("fit", directory, *BASE, "task.kill_at_step=16", expect=-9)
    return directory


@pytest.fixture
def killed(killed_once, tmp_path):
    """A run that was killed after step 15, with a checkpoint of step 10."""
    return shutil.copytree(killed_once, tmp_path / "run")


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def as_directory(path):
    remove(path)
    path.mkdir()
    (path / "inside").touch()


def as_file(path):
    remove(path)
    path.touch()


def as_broken_link(path):
    remove(path)
    path.symlink_to(path.with_name("nowhere"))


def as_link_to_itself(path):
    remove(path)
    path.symlink_to(path)


def as_link(path):
    """A link to what was there, which is now elsewhere."""
    elsewhere = path.parent.with_name("elsewhere")
    if path.exists():
        shutil.move(path, elsewhere)
    else:
        elsewhere.write_text("{}")
    path.symlink_to(elsewhere)


def as_fifo(path):
    remove(path)
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("config.json", as_link),
        ("lock", as_link),
        ("ledger.bin", as_link),
        slow(("run.json", as_link)),
        slow(("attempts.jsonl", as_link)),
        slow(("metrics.jsonl", as_link)),
        ("goodput.jsonl", as_link),
        slow(("goodput.jsonl", as_fifo)),
        slow(("finished.json", as_link)),
        slow(("checkpoints", as_link)),
        slow(("logs", as_link)),
        ("logs/rank-0.log", as_link),
        slow(("run.json", as_fifo)),
        slow(("lock", as_fifo)),
        slow(("ledger.bin", as_fifo)),
        ("checkpoints", as_file),
        ("checkpoints", as_broken_link),
        slow(("checkpoints", as_link_to_itself)),
        ("run.json", as_directory),
        slow(("run.json", as_link_to_itself)),
        slow(("config.json", as_directory)),
        ("attempts.jsonl", as_directory),
        ("ledger.bin", as_directory),
        ("finished.json", as_directory),
        ("lock", as_directory),
        slow(("stop", as_directory)),
        slow(("stopped.json", as_directory)),
        ("logs", as_file),
        slow(("logs", as_broken_link)),
        ("heartbeats", as_file),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(killed, name, make):
    make(killed / name)
    done = run("fit", killed, *BASE, expect=76)
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert str(killed / name) in line
    assert "Traceback" not in done.stderr


def test_the_run_directory_itself_may_be_a_link(killed, tmp_path):
    (tmp_path / "runs").symlink_to(killed.parent)
    (tmp_path / "linked").symlink_to(tmp_path / "runs/run")
    run("fit", tmp_path / "linked", *BASE)
    assert checkpoints(killed)[-1] == 40
    assert "all well" in run("verify", tmp_path / "runs/run").stdout


@pytest.mark.parametrize(
    "name", [".config.json.new", "metrics.jsonl.damaged", ".attempts.jsonl.new"]
)
def test_a_name_that_can_be_foretold_is_not_written_through(killed, tmp_path, name):
    (tmp_path / "mine").write_text("of others")
    (killed / name).symlink_to(tmp_path / "mine")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write("damaged\n")
    run("fit", killed, *BASE)
    assert (tmp_path / "mine").read_text() == "of others"


@pytest.mark.parametrize("make", [as_file, as_broken_link])
def test_a_checkpoint_that_is_no_directory_is_set_aside(killed, make):
    make(killed / "checkpoints/step-000000000030")
    done = run("fit", killed, *BASE)
    assert "The checkpoint of step 30 is damaged" in done.stderr
    assert "resumes at step 10" in done.stdout


@pytest.mark.parametrize("make", [as_directory, slow(as_broken_link)])
def test_metrics_of_another_kind_are_a_warning(killed, make):
    make(killed / "metrics.jsonl")
    done = run("fit", killed, *BASE)
    if make is as_directory:
        assert "metrics.jsonl cannot be opened" in done.stderr
    assert checkpoints(killed)[-1] == 40


@pytest.mark.parametrize(
    ("command", "name", "make", "code"),
    [
        ("verify", "checkpoints", as_file, 76),
        ("verify", "ledger.bin", as_directory, 76),
        slow(("verify", "attempts.jsonl", as_directory, 76)),
        slow(("verify", "config.json", as_directory, 76)),
        slow(("verify", "metrics.jsonl", as_directory, 0)),
        ("evaluate", "checkpoints", as_file, 76),
        slow(("evaluate", "config.json", as_directory, 76)),
        slow(("evaluate", "attempts.jsonl", as_directory, 0)),
        slow(("evaluate", "ledger.bin", as_directory, 0)),
    ],
)
def test_other_commands_do_not_end_in_a_traceback(killed, command, name, make, code):
    make(killed / name)
    done = run(command, killed, *BASE, expect=code)
    assert "Traceback" not in done.stderr
    assert code == 0 or str(killed / name) in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionError(13, "Permission denied"), 76),
        (IsADirectoryError(21, "Is a directory"), 76),
        (FileExistsError(17, "File exists"), 76),
        (OSError(40, "Too many levels of symbolic links"), 76),
        (OSError(5, "Input/output error"), 75),
        (OSError(28, "No space left on device"), 75),
        (OSError(116, "Stale file handle"), 75),
        (FileNotFoundError(2, "No such file or directory"), 75),
    ],
)
def test_the_code_says_whether_a_retry_can_help(tmp_path, error, code):
    refused = unusable(tmp_path / "run.json", error)
    assert refused.code == code
    assert f"{tmp_path / 'run.json'} cannot be used ({error.strerror})" in str(refused)


def test_only_files_of_the_run_directory_are_its_faults(tmp_path):
    expected = r"logs cannot be used \(Not a directory\)"
    with pytest.raises(ResumeRefusedError, match=expected), refused_files(tmp_path):
        raise NotADirectoryError(20, "Not a directory", str(tmp_path / "logs"))
    with pytest.raises(NotADirectoryError), refused_files(tmp_path):
        raise NotADirectoryError(20, "Not a directory", "/data/train.bin")
    with pytest.raises(FileNotFoundError), refused_files(tmp_path):
        raise FileNotFoundError(2, "No such file", str(tmp_path / "of the user"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused_by_name(killed):
    (killed / "ledger.bin").chmod(0)
    done = run("fit", killed, *BASE, expect=Exit.RESUME_REFUSED)
    assert "ledger.bin cannot be used (Permission denied)" in done.stderr
