"""Which rank failed first, and the record of the failure."""

import json
import sys
from types import SimpleNamespace

import pytest

from launch.agent import main as agent
from launch.agent.failure import (
    TERMINATION_BYTES,
    Outcome,
    RankFailure,
    error_of,
    first_failure,
    shell_code,
    tail,
    write_record,
    write_termination,
)
from launch.agent.records import record_outcome, tell_last_failure
from tests.support.runs import TINY, free_port
from train.exits import ADVICE, Exit, is_worth_retrying


def failure(rank, exit_code, error="", time=0.0, **more):
    return RankFailure(rank, rank, "host", 1, exit_code, error, time, more.pop("log", []), **more)


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ([failure(0, 75, time=1), failure(1, 64, "a typo", time=9)], 1),  # clocks differ
        ([failure(0, 75, time=1), failure(1, 137, time=2)], 1),
        ([failure(0, 75, time=1), failure(1, 1, time=2)], 1),
        ([failure(0, 143, time=1), failure(1, 75, "disk full", time=2)], 1),
        ([failure(0, 75, time=1), failure(1, 143, time=2)], 1),
        ([failure(0, 143, time=1, stopped=True), failure(1, 75, time=2)], 1),
        ([failure(0, 75, time=2), failure(1, 75, time=1)], 1),
        ([failure(0, 70, "b", time=2), failure(1, 70, "a", time=1)], 1),
    ],
)
def test_the_failure_that_explains_the_others_comes_first(failures, first):
    assert first_failure(failures).rank == first
    assert first_failure(failures[::-1]).rank == first


@pytest.mark.parametrize(
    ("lost", "asked", "code"), [([], False, 143), ([1], True, 143), ([1], False, 75)]
)
def test_ranks_that_a_lost_node_stopped_were_not_preempted(lost, asked, code):
    found = Outcome.of([failure(0, 143), failure(1, 143, time=1)], lost, asked=asked)
    assert found.exit_code == code
    assert len(found.record()["others"]) == 1
    assert ("agent of a lost node" in found.paragraph()) is (code == 75)


def test_exit_codes_worth_a_retry():
    assert {code for code in Exit if is_worth_retrying(code)} == {Exit.RETRY, Exit.PREEMPTED}
    assert is_worth_retrying(shell_code(-9))
    assert is_worth_retrying(-11)
    assert not is_worth_retrying(1)
    assert not is_worth_retrying(130)
    assert set(ADVICE) == set(Exit)


def test_the_error_is_read_from_torchs_format():
    left = {"message": "UsageError: no such key", "extraInfo": {"timestamp": "12"}}
    assert error_of(left) == ("no such key", 12.0)
    assert error_of("torn") == ("torn", None)


@pytest.mark.parametrize("info", [{"timestamp": "soon"}, {"timestamp": None}, "none", None, {}])
def test_an_error_file_of_another_program_may_have_no_time(info):
    assert error_of({"message": "it broke", "extraInfo": info}) == ("it broke", None)


def test_the_last_lines_of_a_log(tmp_path):
    log = tmp_path / "stderr.log"
    log.write_bytes(b"x" * 50000 + b"\n" + b"\n".join(b"line %d" % n for n in range(100)) + b"\n\n")
    assert tail(log)[-1] == "line 99"
    assert len(tail(log)) == 20
    assert tail(tmp_path / "none") == []


def test_the_last_lines_hold_no_part_of_a_secret(tmp_path):
    log = tmp_path / "stderr.log"
    body = "MIIEpAIBAAKCAQEA0123456789abcdef\n" * 30
    key = "-----BEGIN " + f"PRIVATE KEY-----\n{body}-----END " + "PRIVATE KEY-----\n"
    log.write_text(f"before\n{key}after\n")  # the key begins before the last lines
    assert tail(log) == ["before", "***", "after"]
    log.write_text(f"{key * 30}after\n")  # a key begins before what is read
    assert tail(log) == ["***"] * (len(tail(log)) - 1) + ["after"]
    log.write_text("x --token=" + "hunter2" * 3000 + " after")
    assert tail(log) == [" after"]


def test_records_hold_no_secret_of_several_lines():
    lines = [
        "-----BEGIN " + "PRIVATE KEY-----",
        *["MIIEpAIBAAKCAQEA0123"] * 8,
        "abc=",
        "-----END " + "PRIVATE KEY-----",
    ]
    first = failure(0, 137, log=["before", *lines, "after"])
    outcome = Outcome(first, [first], [])
    assert outcome.record()["first"]["log"] == ["before", "***", "after"]
    assert "MIIE" not in outcome.paragraph()
    assert "after" in outcome.paragraph()


def test_a_paragraph_names_rank_host_error_and_what_to_do():
    first = failure(3, 78, "The loss was not finite")
    said = Outcome(first, [first, failure(0, 75)], []).paragraph()
    assert "Rank 3 on host ended first: exit code 78 (NOT_FINITE), The loss was not finite." in said
    assert "1 other rank ended after it" in said
    assert ADVICE[Exit.NOT_FINITE] in said


def test_a_rank_that_the_agent_killed_is_not_a_riddle():
    first = failure(0, 137, overdue=True, log=["still copying"])
    outcome = Outcome(first, [first], [])
    for said in (outcome.paragraph(), json.dumps(outcome.record())):
        assert "killed by the agent after --shutdown-timeout" in said
        assert "increase --shutdown-timeout" in said
        assert "find out what killed it" not in said
    assert outcome.retry


def test_the_log_is_shown_for_a_rank_without_an_error_file():
    first = failure(0, 137, log=["before", "the last one"])
    said = Outcome(first, [first], [1]).paragraph()
    assert "killed by SIGKILL" in said
    assert "the last one" in said
    assert "Node 1 did not report." in said


def test_records_are_numbered_and_never_replaced(tmp_path):
    first = failure(0, 75)
    for _ in range(2):
        write_record(tmp_path, Outcome(first, [first], []).record())
    assert sorted(p.name for p in (tmp_path / "failures").iterdir()) == ["0001.json", "0002.json"]
    record = json.loads((tmp_path / "failures/0001.json").read_text())
    assert (record["exit_code"], record["retry"], record["first"]["rank"]) == (75, True, 0)


def test_a_record_never_makes_a_run_directory(tmp_path):
    first = failure(0, 75)
    with pytest.raises(FileNotFoundError):
        write_record(tmp_path / "mistyped" / "run", Outcome(first, [first], []).record())
    assert list(tmp_path.iterdir()) == []


def test_each_record_is_written_whatever_else_cannot_be(tmp_path, monkeypatch, unread):
    """Neither the log, nor the termination message, nor the task's module."""
    monkeypatch.setattr(sys, "stderr", unread)
    directory = tmp_path / "run"
    directory.mkdir()
    first = failure(0, 75)
    command = ["python", "-m", "train", "fit", *TINY, f"run.dir={directory}", "task.use=gone:Task"]
    options = SimpleNamespace(termination_log=tmp_path / "gone" / "termination-log")
    record_outcome(options, command, Outcome(first, [first], []), 0, in_run_directory=True)
    record = json.loads((directory / "failures/0001.json").read_text())
    assert record["exit_code"] == 75


@pytest.mark.parametrize(
    "first",
    [
        failure(0, 70, "short", log=["é" * 300] * 20),
        failure(0, 70, "long " * 5000),
    ],
)
def test_a_termination_message_has_a_limited_size(tmp_path, first):
    path = tmp_path / "termination-log"
    others = [failure(rank, 75) for rank in range(1, 600)]
    write_termination(path, Outcome(first, [first, *others], []).record(command=["x"] * 10))
    assert path.stat().st_size <= TERMINATION_BYTES
    record = json.loads(path.read_text())
    assert record["exit_code"] == 70
    assert record["first"]["error"]


def test_no_record_of_a_failure_holds_a_secret(tmp_path, capsys):
    first = failure(
        0, 70, "cannot log in with HF_TOKEN=hunter2", log=["at https://me:hunter2@host"]
    )
    outcome = Outcome(first, [first], [])
    record = outcome.record(command=["python", "x.py"])
    path = write_record(tmp_path, record)
    write_termination(tmp_path / "termination", record)
    texts = [path.read_text(), (tmp_path / "termination").read_text(), outcome.paragraph()]
    assert not any("hunter2" in text for text in texts)
    assert "HF_TOKEN=***" in texts[0]
    assert "https://me:***@host" in texts[0]


def test_the_recorded_command_holds_no_secret(tmp_path):
    path = tmp_path / "termination"
    options = SimpleNamespace(termination_log=path)
    outcome = Outcome(failure(0, 70), [failure(0, 70)], [])
    command = ["python", "x.py", "--password", "hunter2", "MY_KEY=hunter2", "u://a:hunter2@b"]
    record_outcome(options, command, outcome, 1, in_run_directory=False)
    written = json.loads(path.read_text())["command"]
    assert written == ["python", "x.py", "--password", "***", "MY_KEY=***", "u://a:***@b"]


def test_a_retried_failure_is_recorded_before_the_first_attempt_has_made_the_run(tmp_path, capsys):
    """A preflight fails before that; in a pod, its log and termination message end with the pod."""
    command = ["python", "-m", "train", "fit", *TINY, f"run.dir={tmp_path}/runs/a"]
    options = SimpleNamespace(termination_log=tmp_path / "termination-log")
    retried = Outcome(failure(1, 75, "71 MiB free"), [failure(1, 75, "71 MiB free")], [])
    record_outcome(options, command, retried, 1, in_run_directory=True)
    assert not (tmp_path / "runs").exists(), "a directory whose parent does not exist is a typo"
    (tmp_path / "runs").mkdir()
    wrong = Outcome(failure(0, 64, "a typo"), [failure(0, 64)], [])
    record_outcome(options, command, wrong, 1, in_run_directory=True)
    assert not (tmp_path / "runs" / "a").exists()
    outside = SimpleNamespace(termination_log=None)
    record_outcome(outside, command, retried, 1, in_run_directory=True)
    assert not (tmp_path / "runs" / "a").exists(), "not in a container"
    record_outcome(options, command, retried, 1, in_run_directory=True)
    (file,) = (tmp_path / "runs" / "a" / "failures").glob("*.json")
    assert json.loads(file.read_text())["first"]["error"] == "71 MiB free"
    capsys.readouterr()
    tell_last_failure(command)
    said = capsys.readouterr()
    assert "Last failure of this run, at 20" in said.out + said.err
    assert "exit code 75 (RETRY), 71 MiB free" in said.out + said.err
    tell_last_failure(["python", "-m", "train", "fit", *TINY, f"run.dir={tmp_path}/runs/b"])
    tell_last_failure(command, before=json.loads(file.read_text())["time"])  # that of this start
    assert capsys.readouterr().err == ""


def test_agents_that_end_without_ranks_record_why_once(tmp_path, capsys, monkeypatch):
    """Such as nodes that do not join: in a pod, the log goes with the pod, and there may be no run
    directory yet."""
    monkeypatch.setenv("ISORUN_SECRET", "x" * 32)
    message = tmp_path / "termination-log"
    words = ["--nnodes", "3", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-timeout", "1"]
    words += ["--nproc-per-node", "1", "--termination-log", str(message)]
    words += ["--", "python", "-m", "train", "fit", *TINY, f"run.dir={tmp_path}/run"]
    for node in ("1", "2"):
        assert agent.main(["--node-rank", node, *words]) == 75
        record = json.loads(message.read_text())
        assert (record["exit_code"], record["retry"]) == (75, True)
    (file,) = (tmp_path / "run" / "failures").glob("*.json")
    assert "node 0 to listen" in json.loads(file.read_text())["first"]["error"]
    capsys.readouterr()
    monkeypatch.setattr(agent, "_TELL_AFTER", 0.0)
    monkeypatch.setattr(agent, "_prepare_environment", lambda _: None)  # that of this process
    assert agent.main(["--node-rank", "0", *words]) == 75  # it finds nobody either
    assert "Last failure of this run, at 20" in (said := capsys.readouterr().err)
    assert "The agent on " in said
    assert "ended: exit code 75 (RETRY), Timed out" in said
