"""``torchx run -s local_cwd``: agents on this machine train, started by TorchX's own command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.runs import ROOT, TINY, checkpoints, environment, metrics, run
from train.parity.compare import curve, largest_difference

pytestmark = pytest.mark.slow

TORCHX = str(Path(sys.executable).with_name("torchx"))


class User:
    """A user with a separate home directory."""

    def __init__(self, home):
        self.home = home
        self.environment = {**environment(), "XDG_STATE_HOME": str(home / "state")}
        # TorchX and isorun are found by their location; no virtual environment is active.
        self.environment["PATH"] = os.defpath

    def start(self, *words, command=TORCHX):
        return subprocess.Popen(
            [command, *words], cwd=ROOT, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def fit(self, j, directory, *overrides, options=()):
        return self.start(
            "run", "-s", "local_cwd", "isorun.fit", "-j", j, "--preflight", "off", *options,
            *TINY, f"run.dir={directory}", *overrides,
        )  # fmt: skip

    def launch(self, *words):
        done = self.start("-m", "launch", *words, command=sys.executable)
        out, err = done.communicate(timeout=120)
        assert done.returncode == 0, err
        return out

    def ledger(self):
        return [json.loads(line) for line in (self.home / "state/isorun/launches.jsonl").open()]


@pytest.fixture
def user(tmp_path):
    return User(tmp_path)


def ended(process, expect=0):
    """Waits for the process; returns its standard output and error."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def processes_with(text):
    """All processes with this text in their command line."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if text in words:
            found[int(directory.name)] = words
    return found


def wait_until(condition, process, seconds=120):
    started = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < seconds, "timed out"
        time.sleep(0.05)


def identity(directory):
    return json.loads((directory / "run.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run without a launcher."""
    directory = tmp_path_factory.mktemp("alone")
    run("fit", directory, "batch.micro_batch_size=6")
    return directory


@pytest.mark.parametrize(("j", "hosts"), [("1x2", 1), ("2x1", 2)])
def test_two_processes_give_the_result_of_one(user, tmp_path, alone, j, hosts):
    directory = tmp_path / "run"
    out, err = ended(user.fit(j, directory))
    assert "Placement: 2 x cpu" in err
    assert largest_difference(curve(alone, "train/loss"), curve(directory, "train/loss")) <= 1e-5
    assert "all well" in run("verify", directory).stdout

    submitted, end = user.ledger()
    assert submitted["handle"] in out
    assert (submitted["event"], end["event"]) == ("submitted", "ended")
    assert (end["state"], end["exit_codes"]) == ("SUCCEEDED", [0] * hosts)
    assert submitted["run_id"] == identity(directory)["id"]
    assert submitted["wandb_id"] == identity(directory)["wandb_id"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert (submitted["git"] or {}).get("commit", "") == commit
    assert "launch.agent" in submitted["request"]
    table = user.launch("history")
    assert re.search(rf"{submitted['run_id']} +local_cwd +{hosts} +SUCCEEDED", table)
    assert str(directory) in user.launch("show", submitted["run_id"])


def test_two_simultaneous_launches_use_separate_rendezvous(user, tmp_path):
    directories = [tmp_path / "one", tmp_path / "other"]
    processes = [user.fit("2x1", directory, "task.sleep=0.02") for directory in directories]
    for process in processes:
        ended(process)
    ports = {line["env"]["PET_RDZV_PORT"] for line in user.ledger() if "env" in line}
    assert len(ports) == 2
    for directory in directories:
        assert max(row["step"] for row in metrics(directory)) == 40
    assert identity(directories[0])["id"] != identity(directories[1])["id"]


def test_the_exit_code_of_the_rank_is_returned_and_why_reports_the_cause(user, tmp_path):
    directory = tmp_path / "run"
    process = user.fit(
        "1x2", directory, "task.nan_at_steps=[2,3,4,5,6,7]", "optim.max_skipped_steps=2"
    )
    _, err = ended(process, expect=78)
    assert "NOT_FINITE" in err
    said = user.launch("why", user.ledger()[0]["run_id"])
    assert "exit code 78 (NOT_FINITE)" in said
    assert "would fail again" in said
    assert re.search(r"Rank \d on \S+ ended first", said)
    assert "FAILED (78)" in user.launch("history")


@pytest.mark.parametrize(
    ("j", "number"), [("1x2", signal.SIGTERM), ("2x1", signal.SIGINT), ("1x2", signal.SIGHUP)]
)
def test_a_cancelled_launch_saves_and_leaves_no_process(user, tmp_path, j, number):
    directory = tmp_path / "run"
    process = user.fit(j, directory, "task.sleep=0.05", "length.steps=10000", "loader.workers=1")
    wait_until(lambda: (directory / "metrics.jsonl").exists() and metrics(directory), process)
    # The launcher, an agent per node, and for each of two processes a rank and its data worker.
    assert len(processes_with(str(directory))) >= 1 + int(j[0]) + 2 + 2
    process.send_signal(number)
    _, err = ended(process, expect=143)
    assert "Traceback" not in err
    assert f"isorun: stopped by {number.name}: {user.ledger()[0]['handle']} is CANCELLED." in err
    assert processes_with(str(directory)) == {}
    assert checkpoints(directory), "the ranks did not save"
    assert user.ledger()[-1]["state"] == "CANCELLED"
    assert "CANCELLED" in user.launch("history")


def test_a_process_in_a_new_session_is_ended_as_well(user):
    code = (
        "import subprocess, time; subprocess.Popen(['sleep', '98765.4'], start_new_session=True); "
        "print('it sleeps'); time.sleep(9999)"
    )
    process = user.start("run", "-s", "local_cwd", "isorun.run", "--", "python", "-c", code)
    wait_until(lambda: [w for w in processes_with("98765.4").values() if w[:5] == "sleep"], process)
    process.send_signal(signal.SIGTERM)
    _, err = ended(process, expect=143)
    assert "Traceback" not in err
    assert processes_with("98765.4") == {}
    assert user.ledger()[-1]["state"] == "CANCELLED"


def test_the_ranks_of_a_killed_agent_end(user, tmp_path):
    directory = tmp_path / "run"
    process = user.fit("1x2", directory, "task.sleep=0.05", "length.steps=10000")
    wait_until(lambda: (directory / "metrics.jsonl").exists() and metrics(directory), process)
    agent = next(
        pid for pid, words in processes_with(str(directory)).items() if "launch.agent" in words
    )
    os.kill(agent, signal.SIGKILL)
    ended(process, expect=137)
    assert processes_with(str(directory)) == {}


def test_a_killed_launcher_is_detected(user, tmp_path):
    directory = tmp_path / "run"
    process = user.fit("1x1", directory, "task.sleep=0.05", "length.steps=10000")
    wait_until((directory / "metrics.jsonl").exists, process)
    assert "RUNNING" in user.launch("history")
    process.kill()
    process.communicate()
    try:
        assert "LOST" in user.launch("history")
        assert "launch it again" in user.launch("why", user.ledger()[0]["run_id"])
    finally:
        for pid in processes_with(str(directory)):
            os.kill(pid, signal.SIGKILL)


def test_a_second_submission_continues_the_same_run(user, tmp_path):
    directory = tmp_path / "run"
    ended(user.fit("1x1", directory))
    born = identity(directory)
    _, err = ended(user.fit("1x2", directory))
    assert "is already finished" in err
    first, second = (line for line in user.ledger() if line["event"] == "submitted")
    assert identity(directory) == born
    assert first["run_id"] == second["run_id"] == born["id"]
    assert second["env"]["WANDB_RUN_ID"] == born["wandb_id"]


def test_a_sweep_trains_every_combination(user, tmp_path):
    words = [word for word in TINY if not word.startswith(("optim.lr", "length"))]
    process = user.start(
        "run", "-s", "local_cwd", "isorun.sweep", "-j", "2x1", *words,
        "length.steps=6", f"run.dir={tmp_path / 'sweep'}", "optim.lr=0.1,0.01", "run.seed=0,1",
    )  # fmt: skip
    ended(process)
    names = sorted(path.name for path in (tmp_path / "sweep").iterdir())
    assert names == sorted(f"optim.lr={lr}_run.seed={s}" for lr in ("0.1", "0.01") for s in (0, 1))
    ids = {identity(tmp_path / "sweep" / name)["id"] for name in names}
    stem = user.ledger()[0]["run_id"]
    assert ids == {f"{stem}-{number}" for number in (1, 2, 3, 4)}
    rates = [
        json.loads((tmp_path / "sweep" / name / "config.json").read_text())["optim"]["lr"]
        for name in names
    ]
    assert rates == [0.01, 0.01, 0.1, 0.1]


def test_any_command_runs_under_the_agent(user):
    process = user.start(
        "run", "-s", "local_cwd", "isorun.run", "-j", "1x2", "--env", "COLOUR=green", "--",
        "python", "-c", "import os; print(os.environ['RANK'], os.environ['COLOUR'], '${HOME}')",
    )  # fmt: skip
    _, err = ended(process)
    assert {"0 green ${HOME}", "1 green ${HOME}"} <= set(re.findall(r"\d green \S+", err))


def torchx(user, *words, expect=0):
    out, err = ended(user.start(*words), expect)
    assert "Traceback" not in err
    return out + err


def test_status_log_list_and_cancel_work_for_a_job_of_another_command(user, tmp_path):
    directory = tmp_path / "run"
    process = user.fit("1x2", directory, "task.sleep=0.05", "length.steps=10000")
    wait_until(lambda: (directory / "metrics.jsonl").exists() and metrics(directory), process)
    handle = user.ledger()[0]["handle"]
    assert "RUNNING" in torchx(user, "status", handle)
    assert re.search(rf"{handle} +RUNNING", torchx(user, "list", "-s", "local_cwd"))
    log = user.start("log", handle)  # follows the log
    torchx(user, "cancel", handle)
    ended(process, expect=143)
    out, err = ended(log)
    assert "step 1/10000" in out
    assert "Traceback" not in err
    assert processes_with(str(directory)) == {}
    assert checkpoints(directory)
    assert user.ledger()[-1]["state"] == "CANCELLED"
    assert re.search(rf"{handle} +CANCELLED", torchx(user, "list", "-s", "local_cwd"))


def test_status_log_and_list_of_a_job_that_has_ended(user):
    """TorchX forgets local jobs when their command ends; the launch log keeps them."""
    command = ("isorun.run", "--", "python", "-c", "print('it ran')")
    ended(user.start("run", "-s", "local_cwd", *command))
    kept = user.home / "logs"
    ended(user.start("run", "-s", "local_cwd", "-cfg", f"log_dir={kept}", *command))
    gone, there = (line["handle"] for line in user.ledger() if line["event"] == "submitted")
    assert "SUCCEEDED" in torchx(user, "status", gone)
    listed = torchx(user, "list", "-s", "local_cwd")
    assert re.findall(r"(\S+) +SUCCEEDED", listed) == [gone, there]
    assert (
        f"isorun: error: {gone} is SUCCEEDED: the `torchx run` that started it has ended"
        in torchx(user, "log", gone, expect=64)
    )
    for words in ((there,), (f"{there}/run/0",), ("--streams", "stdout", f"{there}/run")):
        assert "it ran" in torchx(user, "log", *words)
    assert "SUCCEEDED" in user.launch("history")


def test_status_log_and_list_of_an_unknown_job(user):
    unknown = "local_cwd://torchx/x"
    assert "does not exist" in torchx(user, "status", unknown, expect=1)
    for name in (unknown, f"{unknown}/fit/0"):
        assert "isorun: error: local_cwd has no job 'x'" in torchx(user, "log", name, expect=64)
    assert "APP HANDLE" in torchx(user, "list", "-s", "local_cwd")
