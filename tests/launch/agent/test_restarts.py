"""Restarts by a JobSet end some time after the first one."""

import json
import os
import time

import pytest

from launch.agent import main as agent
from launch.agent.restarts import Restart, check_restart
from launch.contract import ResumeRefusedError
from tests.support.runs import TINY

DAY = 86_400
UID = "5d8f0b1c-1111-4222-8333-abcdefabcdef"


def restarted(directory, number, by=UID, deadline=7 * DAY):
    check_restart(directory, Restart(by, number), deadline)


def age(directory, seconds):
    """Lets some time pass: the marks become older."""
    for mark in (directory / "failures" / "restarts").iterdir():
        old = mark.stat().st_mtime - seconds
        os.utime(mark, (old, old))


def fail(directory, error="No space left on device"):
    first = {"rank": 1, "host": "node-b", "error": error, "log": []}
    record = {
        "time": time.time(), "exit_code": 75, "what": "exit code 75 (RETRY)", "retry": True,
        "first": first, "others": [], "lost_nodes": [],
    }  # fmt: skip
    (directory / "failures" / "0001.json").write_text(json.dumps(record))


def test_restarts_end_some_time_after_the_first_one(tmp_path):
    restarted(tmp_path, 0)
    for number in range(1, 8):
        restarted(tmp_path, number)
        age(tmp_path, DAY)
    fail(tmp_path)
    with pytest.raises(ResumeRefusedError) as refused:
        restarted(tmp_path, 8)
    text = str(refused.value)
    assert "Restarts end 604800 s after the first one (--restart-deadline" in text
    assert "the first of 8 was at 20" in text
    assert "Rank 1 on node-b ended first: exit code 75 (RETRY), No space left on device;" in text
    assert len(list((tmp_path / "failures" / "restarts").iterdir())) < 4, "they do not pile up"


def test_another_submission_of_the_run_starts_anew(tmp_path):
    restarted(tmp_path, 1)
    age(tmp_path, 30 * DAY)
    with pytest.raises(ResumeRefusedError):
        restarted(tmp_path, 2)
    restarted(tmp_path, 1, by="another")
    restarted(tmp_path, 1)  # where the identity is not known


def test_the_time_in_a_queue_does_not_count(tmp_path):
    """A JobSet that was suspended goes on with the same number of restarts."""
    restarted(tmp_path, 1)
    restarted(tmp_path, 2)
    age(tmp_path, 30 * DAY)
    restarted(tmp_path, 2)
    age(tmp_path, 6 * DAY)
    restarted(tmp_path, 3)


def test_a_run_directory_is_made_but_not_its_parent(tmp_path, capsys):
    restarted(tmp_path / "run", 1)
    assert (tmp_path / "run" / "failures").is_dir()
    restarted(tmp_path / "mistyped" / "run", 1)
    assert "This restart cannot be recorded in" in capsys.readouterr().err
    assert not (tmp_path / "mistyped").exists()


def test_a_link_instead_of_the_folder_is_not_followed(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "failures").symlink_to(tmp_path / "elsewhere")
    restarted(tmp_path / "run", 1)
    assert "cannot be recorded" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("by", "number", "known"),
    [(UID, "3", UID), ("", "3", "unknown"), (UID, "", ""), (UID, "x", ""), ("../a", "3", "")],
)
def test_what_restarts_the_agent_is_told_by_the_environment(by, number, known):
    found = Restart.of({"ISORUN_RESTARTED_BY": by, "ISORUN_RESTARTS": number})
    assert found == (Restart(known, 3) if known else None)


def test_the_agent_of_node_0_ends_the_restarts_and_records_why(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    restarted(run, 1)
    age(run, 2 * DAY)
    monkeypatch.setenv("ISORUN_RESTARTED_BY", UID)
    monkeypatch.setenv("ISORUN_RESTARTS", "9")
    message = tmp_path / "termination-log"
    words = ["--restart-deadline", str(DAY), "--termination-log", str(message)]
    words += ["--nproc-per-node", "1", "--", "python", "-m", "train", "fit", *TINY]
    assert agent.main([*words, f"run.dir={run}"]) == 76
    assert "error: Restarts end 86400 s after the first one" in capsys.readouterr().err
    (file,) = (run / "failures").glob("*.json")
    for record in map(json.loads, (file.read_text(), message.read_text())):
        assert (record["exit_code"], record["retry"]) == (76, False)
        assert record["first"]["error"].startswith("Restarts end 86400 s")
