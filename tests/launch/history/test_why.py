"""``python -m launch why``: the failure that it reports, and the sources of its parts."""

import json
import time
from pathlib import Path

import pytest
from torchx.schedulers.api import DescribeAppResponse
from torchx.schedulers.slurm_scheduler import SlurmScheduler
from torchx.specs import AppState, ReplicaStatus, RoleStatus

from launch.agent.failure import write_record
from launch.history import launch_log
from launch.torchx.schedulers import create
from tests.launch.launched import said, submit
from train.exits import is_worth_retrying


def failure(directory, code, *, rank=1, ago=0, others=(), error="", log=(), number=0):
    record = {
        "exit_code": code, "what": f"exit code {code}", "retry": is_worth_retrying(code),
        "advice": "", "first": {"rank": rank, "host": "far", "error": error, "log": list(log)},
        "others": list(others), "lost_nodes": [], "time": time.time() - ago, "round": number,
    }  # fmt: skip
    folder = directory / "failures"
    folder.mkdir(exist_ok=True)
    number = len(list(folder.iterdir())) + 1
    (folder / f"{number:04d}.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("code", "again", "what_to_do"),
    [
        (75, "may succeed", "fix the cause, then rerun"),
        (78, "would fail again", "lower optim.lr"),
        (137, "may succeed", "find out what killed it"),
    ],
)
def test_why_names_the_rank_the_error_and_the_remedy(capsys, tmp_path, code, again, what_to_do):
    handle, _ = submit("3", "slurm", f"run.dir={tmp_path}")
    other = {"rank": 0, "host": "near", "exit_code": 75}
    failure(tmp_path, code, error="The loss was not finite.", others=[other])
    failure(tmp_path, code, rank=0, log=["less is known here"])
    launch_log.record_end(handle, "FAILED", [code])
    told = said(capsys, "why", "3")
    assert f"Rank 1 on far ended first: exit code {code}" in told
    assert "The loss was not finite." in told
    assert "rank 0 (75)" in told
    assert what_to_do in told
    assert again in told


def test_incomplete_failure_records_are_ignored(capsys, tmp_path):
    handle, _ = submit("3", "slurm", f"run.dir={tmp_path}")
    failure(tmp_path, 75, error="The disk is full.")
    complete = json.loads((tmp_path / "failures/0001.json").read_text())
    for number, values in enumerate(
        [{}, [1], {"time": time.time()}, {**complete, "first": {}}, {**complete, "others": [1]}]
    ):
        (tmp_path / f"failures/1{number}.json").write_text(json.dumps(values))
    launch_log.record_end(handle, "FAILED", [75])
    assert "The disk is full." in said(capsys, "why", "3")


@pytest.mark.normal
def test_why_ignores_an_earlier_launch_of_the_same_run(capsys, tmp_path):
    failure(tmp_path, 71, ago=3600)
    handle, _ = submit("3", "slurm", f"run.dir={tmp_path}")
    launch_log.record_end(handle, "FAILED", [64])
    told = said(capsys, "why", "3")
    assert "exit code 71" not in told
    assert "There is no failure record on this machine" in told
    assert "correct what the message names" in told


def test_the_report_is_about_a_single_failure(capsys, tmp_path):
    """The ranks were killed and restarted; then the disk was full."""
    handle, _ = submit("3", "slurm", f"run.dir={tmp_path}", time=time.time() - 60)
    others = [{"rank": rank, "host": "near", "exit_code": 137} for rank in (2, 3, 4)]
    failure(tmp_path, 137, ago=5, others=others, number=0)
    failure(tmp_path, 75, rank=2, error="The disk is full.", number=1)
    launch_log.record_end(handle, "FAILED", [75])
    told = said(capsys, "why", "3")
    assert "Rank 2 on far ended first: exit code 75" in told
    assert "The disk is full." in told
    assert "fix the cause" in told
    assert "exit code 137" not in told


def test_of_several_records_of_a_failure_the_one_with_its_cause_is_reported(capsys, tmp_path):
    """A node that was not informed in time reports that it lost the other nodes."""
    handle, _ = submit("3", "slurm", f"run.dir={tmp_path}")
    failure(tmp_path, 78, rank=7, error="The loss was not finite.")
    failure(tmp_path, 75, others=[{"rank": 0, "host": "near", "exit_code": 75}])
    launch_log.record_end(handle, "FAILED", [78])
    told = said(capsys, "why", "3")
    assert "Rank 7 on far ended first: exit code 78" in told
    assert "lower optim.lr" in told
    assert "exit code 75" not in told


@pytest.mark.normal
def test_the_message_of_the_scheduler_is_kept(capsys, monkeypatch, home):
    submit("17")
    replicas = [ReplicaStatus(0, AppState.FAILED, "fit", "node1")]
    monkeypatch.setattr(
        SlurmScheduler,
        "describe",
        lambda *_: DescribeAppResponse(
            app_id="17", state=AppState.FAILED, msg="NODE_FAIL",
            roles_statuses=[RoleStatus("fit", replicas)],
        ),
    )  # fmt: skip
    create("slurm", "torchx").describe("17")
    monkeypatch.setenv("PATH", str(home))  # Slurm does not know the job any more
    told = said(capsys, "why", "17")
    assert "NODE_FAIL" in told
    assert "fit/0: FAILED on node1" in told
    assert "NODE_FAIL" in said(capsys, "show", "17")


@pytest.mark.normal
def test_an_end_recorded_without_a_message_is_reported(capsys):
    handle, _ = submit("9")
    launch_log.record_end(handle, "FAILED", [75])
    lines = [json.loads(line) for line in launch_log.path().open()]
    del lines[-1]["message"], lines[-1]["replicas"]
    launch_log.path().write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "FAILED, exit code 75" in said(capsys, "why", "9")


def test_agents_that_write_at_the_same_time_do_not_replace_each_other_s_records(
    tmp_path, monkeypatch
):
    """Both have read the next number before one of them writes."""
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    for agent in ("one", "other"):
        write_record(tmp_path, {"agent": agent})
    for name, agent in {"0001": "one", "0002": "other"}.items():
        assert json.loads((tmp_path / f"failures/{name}.json").read_text())["agent"] == agent


def test_texts_of_files_cannot_command_the_terminal(capsys, tmp_path):
    handle, _ = submit("3", "slurm", f"run.dir={tmp_path}")
    failure(tmp_path, 75, error="\x1b[2J\x1b]0;x\x07 full", log=["\x9b31m"])
    launch_log.record_end(handle, "FAILED", [75])
    told = said(capsys, "why", "3")
    assert "\\x1b[2J" in told
    assert not any(ord(letter) < 32 and letter != "\n" for letter in told)
