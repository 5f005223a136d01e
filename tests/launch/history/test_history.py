import json
import os
import re
import socket
import subprocess
import sys

import pytest
from torchx.runner import get_runner
from torchx.specs import AppState

from launch.history import launch_log
from launch.history.launches import all_launches, find_launch
from launch.torchx.schedulers import create
from tests.launch.launched import said, submit
from tests.launch.launching import app
from tests.support.runs import ROOT, TINY
from train.exits import UsageError


def test_a_launch_is_recorded_with_command_request_image_and_commit(monkeypatch):
    handle, run_id = submit()
    (line,) = launch_log.read()
    assert line["handle"] == handle
    assert (line["run_id"], line["wandb_id"]) == (run_id, run_id)
    assert line["command"][-len(TINY) :] == TINY
    assert line["request"] == "the request"
    assert line["image"] == "isorun:cpu"
    git = ["git", "rev-parse", "HEAD"]
    if (ROOT / ".git").exists():
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert line["git"]["commit"] == commit
        assert isinstance(line["git"]["dirty"], bool)
    assert launch_log.path().stat().st_mode & 0o077 == 0, "others can read the launch log"


def test_an_image_that_is_named_by_its_digest_is_recorded_with_it():
    digest = "sha256:" + "0" * 64
    made = app("isorun.fit", "--image", f"reg/isorun@{digest}", *TINY)
    launch_log.record_start("kubernetes://torchx/x", "kubernetes", made, "")
    assert next(launch_log.read())["image_digest"] == digest


def test_the_launch_log_is_append_only(home):
    submit("a")
    before = launch_log.path().read_bytes()
    submit("b")
    launch_log.record_end("slurm://torchx/a", "FAILED", [75])
    assert launch_log.path().read_bytes().startswith(before)
    assert len(list(launch_log.read())) == 3


def test_an_end_is_recorded_once_and_only_for_recorded_launches():
    handle, _ = submit()
    launch_log.record_end(handle, "SUCCEEDED", [0, 0])
    launch_log.record_end(handle, "FAILED", [1])
    launch_log.record_end("slurm://torchx/somebody-elses", "FAILED", [1])
    assert [launch.state for launch in all_launches()] == ["SUCCEEDED"]
    assert len(list(launch_log.read())) == 2


def test_an_incomplete_line_does_not_hide_others():
    submit("a")
    with launch_log.path().open("a") as file:
        file.write('{"event": "subm\n')
        file.write("1\n{}\n")
        file.writelines(
            f'{{"event": "{event}"}}\n' for event in ("submitted", "ended", "cancelled")
        )
        file.write('{"event": "ended", "time": 1, "handle": "x", "state": "y", "exit_codes": 1}\n')
    submit("b")
    assert len(all_launches()) == 2
    assert not launch_log.was_cancelled("x")
    assert launch_log.code_of_this_process() is None


def test_a_launch_log_that_cannot_be_written_does_not_prevent_a_launch(home, monkeypatch, capsys):
    blocked = home / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    submit()
    assert "the launch log" in capsys.readouterr().err


@pytest.mark.normal
def test_the_end_is_recorded_when_the_scheduler_is_asked(monkeypatch):
    """By any command: `torchx status`, `torchx run --wait` or `history`."""
    from torchx.schedulers.api import DescribeAppResponse
    from torchx.schedulers.slurm_scheduler import SlurmScheduler

    _handle, _ = submit("17")
    state = AppState.RUNNING
    monkeypatch.setattr(
        SlurmScheduler, "describe", lambda *_: DescribeAppResponse(app_id="17", state=state)
    )
    slurm = create("slurm", "torchx")
    slurm.describe("17")
    assert find_launch("17").state == "UNKNOWN"
    state = AppState.FAILED
    slurm.describe("17")
    slurm.describe("17")
    assert find_launch("17").state == "FAILED"
    assert len(list(launch_log.read())) == 2


def test_history_is_a_table_of_the_newest_launches(capsys):
    handles = [submit(str(number))[0] for number in range(3)]
    launch_log.record_end(handles[1], "FAILED", [143, 75])
    launch_log.record_end(handles[2], "SUCCEEDED", [0, 0])
    lines = said(capsys, "history", "-n", "2", "--offline").splitlines()
    assert lines[0].split() == ["submitted", "run", "scheduler", "nodes", "state", "handle"]
    assert len(lines) == 3
    assert re.search(r"slurm +2 +FAILED \(75\) +slurm://torchx/1$", lines[1])
    assert re.search(r"slurm +2 +SUCCEEDED +slurm://torchx/2$", lines[2])


def test_history_without_launches(capsys, home):
    assert said(capsys, "history") == f"No launches recorded in {launch_log.path()}.\n"


@pytest.mark.normal
def test_a_scheduler_that_cannot_be_asked_is_reported(capsys, monkeypatch, home):
    monkeypatch.setenv("PATH", str(home))  # no squeue, no sacct
    submit("5")
    assert re.search(r"UNKNOWN|GONE", said(capsys, "history"))
    assert "scheduler" in said(capsys, "show", "5")


def test_show_prints_all_and_why_needs_a_known_run(capsys):
    handle, run_id = submit("9", "slurm", "run.dir=/shared/runs/nine")
    launch_log.record_end(handle, "SUCCEEDED", [0])
    for name in (run_id, handle, "9", run_id[:-2]):
        shown = said(capsys, "show", name)
        assert "run directory /shared/runs/nine" in shown
        assert "the request" in shown
    assert json.loads(said(capsys, "show", "9", "--json"))["ended"]["state"] == "SUCCEEDED"
    assert "it succeeded" in said(capsys, "why", "9")
    assert f"{run_id!r}"[1:-1] in said(capsys, "why", f"{run_id}x", expect=64)


def test_an_ambiguous_prefix_is_refused():
    _, first = submit("1", "slurm", "run.name=mine-a")
    _, second = submit("2", "slurm", "run.name=mine-b")
    with pytest.raises(UsageError, match=f"'mine' matches {first}, {second}; give one"):
        find_launch("mine")


def test_a_local_launch_without_its_process_is_lost(capsys):
    submit("4", "local_cwd", pid=2**22 + 1)
    assert "LOST" in said(capsys, "history")
    submit("5", "local_cwd", host="elsewhere", pid=os.getpid())
    assert find_launch("5").refresh() == "UNKNOWN"
    assert socket.gethostname() == find_launch("4").line["host"]


@pytest.mark.normal
def test_torchx_lists_local_jobs_from_the_launch_log(monkeypatch, home):
    handle, _ = submit("4", "local_cwd", pid=2**22 + 1)
    other, _ = submit("5", "local_cwd")
    launch_log.record_end(other, "FAILED", [75])
    monkeypatch.setenv("PATH", str(home))  # no squeue, no sacct
    with get_runner() as runner:
        found = {job.app_handle: job.state.name for job in runner.list("local_cwd")}
        assert found == {handle: "UNKNOWN", other: "FAILED"}
        assert runner.list("slurm") == []


def test_usage_errors_are_sentences(capsys):
    assert "did you mean history?" in said(capsys, "histroy", expect=64)
    assert "see `isorun show --help`" in said(capsys, "show", expect=64)
    assert "-n must be at least 1, but is 0" in said(capsys, "history", "-n", "0", expect=64)


def test_help_lists_all_commands_and_imports_nothing_heavy():
    code = (
        "import sys; from launch.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "print([m for m in ('torch', 'torchx', 'kubernetes') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("[]"), done.stderr
    for name in ("history", "show", "why", "render"):
        assert re.search(rf"^    {name} ", done.stdout, re.MULTILINE)


def test_the_directory_and_the_file_of_the_launch_log_are_private():
    before = os.umask(0)
    try:
        launch_log.path().parent.mkdir(parents=True)
        launch_log.path().touch()
        submit()
    finally:
        os.umask(before)
    assert launch_log.path().stat().st_mode & 0o777 == 0o600
    assert launch_log.path().parent.stat().st_mode & 0o777 == 0o700


def test_a_link_in_place_of_the_launch_log_is_not_followed(tmp_path, capsys):
    launch_log.path().parent.mkdir(parents=True)
    launch_log.path().symlink_to(tmp_path / "target")
    submit()
    assert not (tmp_path / "target").exists()
    assert "cannot be written" in capsys.readouterr().err
