"""The agent of one node and its ranks, as processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.agent.signals import Signals, StopSignal
from tests.support.forked import quick_python, run
from tests.support.lanes import slow, thinned
from tests.support.runs import ROOT, TINY, checkpoints, environment, free_port


def start(*options, script=None, command=None, env=(), quick=True):
    """Starts the agent with a command, or with ``script`` as its ranks. If not ``quick``, the agent
    is a child of this process."""
    command = ["python", "-c", script] if command is None else command
    python, variables = quick_python() if quick else (sys.executable, {})
    return subprocess.Popen(
        [python, "-m", "launch.agent", *options, "--", *command],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**environment(), **variables, **dict(env)},
    )  # fmt: skip


def end(agent, timeout=120):
    out, err = agent.communicate(timeout=timeout)
    return agent.returncode, out, err


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().split()[2] == "Z"


FIT = ["python", "-m", "train", "fit", *TINY]


@pytest.mark.slow
def test_ranks_know_when_they_were_submitted_or_their_agent_started():
    script = "import os; print(os.environ['ISORUN_SUBMITTED_AT'])"
    before = time.time()
    _, out, _ = end(start("--nproc-per-node", "1", script=script))
    assert before - 0.01 <= float(out) <= time.time()
    _, out, _ = end(start("--nproc-per-node", "1", script=script, env={"ISORUN_SUBMITTED_AT": "7"}))
    assert float(out) == 7


@pytest.mark.parametrize("code", thinned([0, 1, 64, 78, 143], kept=[64]))
def test_the_exit_code_of_the_ranks_is_returned(code):
    found, _, err = end(start("--nproc-per-node", "2", script=f"import sys; sys.exit({code})"))
    assert found == code
    assert ("ended first" in err) == (code != 0)


@pytest.mark.slow
def test_a_signal_is_returned_as_an_exit_code():
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    code, _, err = end(start(script=script))
    assert code == 128 + signal.SIGKILL
    assert "killed by SIGKILL" in err


@pytest.mark.parametrize(
    ("code", "starts"),
    thinned([(75, 3), (137, 3), (64, 1), (70, 1), (143, 1)], kept=[(137, 3)]),
)
def test_only_failures_worth_a_retry_are_restarted(tmp_path, code, starts):
    end_with = "os.kill(os.getpid(), 9)" if code == 137 else f"sys.exit({code})"
    script = f"import os, sys; open({str(tmp_path / 'starts')!r}, 'a').write('x'); {end_with}"
    found, _, err = end(start("--max-restarts", "2", script=script))
    assert found == code
    assert len((tmp_path / "starts").read_text()) == starts
    assert err.count("Restarting the ranks") == starts - 1


@pytest.mark.slow
def test_a_restart_can_succeed(tmp_path):
    script = (
        "import os, sys; path = os.environ['SEEN']; first = not os.path.exists(path); "
        "open(path, 'w'); sys.exit(75 * first)"
    )
    agent = start("--max-restarts", "1", script=script, env={"SEEN": str(tmp_path / "seen")})
    assert end(agent)[0] == 0


LISTENS = """
import os, signal, sys, time
seen = open(os.environ["SEEN"] + os.environ["RANK"], "w", buffering=1)
def note(number, frame):
    seen.write(signal.Signals(number).name + "\\n")
    note.at = note.at or time.monotonic()
note.at = 0
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
    signal.signal(number, note)
print(os.environ["ISORUN_STOP_DEADLINE"], flush=True)
open(os.environ["SEEN"] + "ready" + os.environ["RANK"], "w")
while not note.at or time.monotonic() < note.at + float(os.environ["TAKES"]):
    time.sleep(0.01)
sys.exit(143)
"""


def listening(tmp_path, *options, takes, quick=True):
    agent = start("--nproc-per-node", "2", *options, script=LISTENS,
                  env={"SEEN": str(tmp_path / "seen"), "TAKES": str(takes)}, quick=quick)  # fmt: skip
    for rank in range(2):
        wait_for(tmp_path / f"seenready{rank}")
    return agent


def test_an_agent_that_nohup_started_keeps_running_after_a_hangup():
    signals = Signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.install()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signals.first is None
    with pytest.raises(StopSignal, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_hangup_is_otherwise_a_request_to_stop():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    Signals().install()
    with pytest.raises(StopSignal, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGHUP)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *map(slow, (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU))],
)
def test_a_stop_reaches_each_rank_once(tmp_path, number):
    agent = listening(tmp_path, "--shutdown-timeout", "40", takes=1)
    for _ in range(3):
        agent.send_signal(number)
        time.sleep(0.2)
    code, out, _ = end(agent)
    assert code == 143
    assert out.split() == ["35", "35"]  # the grace period less a margin
    for rank in range(2):
        assert (tmp_path / f"seen{rank}").read_text().split() == [number.name]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_ranks_that_die_of_a_forwarded_signal_were_stopped(number, tmp_path):
    script = f"open({str(tmp_path / 'ready')!r}, 'w'); import time; time.sleep(60)"
    agent = start("--max-restarts", "3", script=script)
    wait_for(tmp_path / "ready")
    agent.send_signal(number)
    code, _, err = end(agent)
    assert code == 143, err
    assert "Restarting" not in err


@pytest.mark.slow
def test_a_second_ctrl_c_is_passed_on(tmp_path):
    agent = listening(tmp_path, takes=2)
    for _ in range(2):
        agent.send_signal(signal.SIGINT)
        time.sleep(0.5)
    end(agent)
    assert (tmp_path / "seen0").read_text().split() == ["SIGINT", "SIGINT"]


@pytest.mark.slow
def test_ranks_that_do_not_end_in_time_are_killed(tmp_path):
    agent = listening(tmp_path, "--shutdown-timeout", "1", takes=1000)
    agent.send_signal(signal.SIGTERM)
    code, _, err = end(agent, timeout=30)
    assert code == 137
    assert "1 s (--shutdown-timeout)" in err
    assert "ended first: killed by the agent after --shutdown-timeout" in err


@pytest.mark.slow
def test_an_agent_that_was_asked_to_stop_reports_before_its_launcher_kills_it(tmp_path):
    """Its ranks and those of the other node hang, and the other node was not asked to stop."""
    script = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"open({str(tmp_path / 'ready')!r} + os.environ['RANK'], 'w'); time.sleep(600)"
    )
    port, logs = free_port(), [tmp_path / "node0", tmp_path / "node1"]
    agents = [
        start("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--node-rank", str(node),
              "--preflight", "off", "--shutdown-timeout", "2", "--termination-log", str(log),
              script=script)
        for node, log in enumerate(logs)
    ]  # fmt: skip
    for rank in range(2):
        wait_for(tmp_path / f"ready{rank}")
    agents[1].send_signal(signal.SIGTERM)
    wait_for(logs[1])
    assert agents[1].poll() is None, "the record must be there before other nodes report"
    code, _, err = end(agents[1])
    assert code == 137
    # torch orders the nodes of one host by their pids, which the kernel may count from 0 again.
    own = int(re.search(r"is node ([01]) of 2", err)[1])
    assert f"Node {1 - own} did not report" in err
    assert json.loads(logs[1].read_text())["first"]["overdue"]
    agents[0].send_signal(signal.SIGTERM)
    assert end(agents[0])[0] == 137


def test_ranks_get_sigterm_when_their_agent_is_killed(tmp_path):
    agent = listening(tmp_path, takes=0, quick=False)
    children = subprocess.run(
        ["ps", "--ppid", str(agent.pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(children) == 2
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + 20
    while not all(gone(int(pid)) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # Linux signals a child for each thread of its parent that dies last, so perhaps twice.
    assert set((tmp_path / "seen1").read_text().split()) == {"SIGTERM"}


@pytest.mark.slow
def test_a_signal_before_the_ranks_start_ends_the_agent_at_once(tmp_path):
    agent = start("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--node-rank", "0",
                  "--preflight", "off", script="")  # fmt: skip
    time.sleep(4)  # it waits for the second node, which is never started
    agent.send_signal(signal.SIGTERM)
    code, _, err = end(agent, timeout=20)
    assert code == 143
    assert "nothing is lost" in err


@pytest.mark.parametrize("lacks", thinned([0, 1], kept=[1]))
@pytest.mark.slow
def test_all_nodes_end_with_the_error_of_one_that_lacks_the_script(tmp_path, lacks):
    """Instead of waiting for it."""
    script = tmp_path / "mine.py"
    script.write_text("import time; time.sleep(600)")
    port = free_port()
    agents = [
        start("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--node-rank", str(node),
              "--preflight", "off",
              command=["python", str(tmp_path / "gone.py" if node == lacks else script)])
        for node in range(2)
    ]  # fmt: skip
    ends = [end(agent) for agent in agents]
    assert [code for code, *_ in ends] == [64, 64]
    for _, _, err in ends:
        assert re.search(
            r"ended first: .*On \S+: The command after -- runs .*gone.py', which", err, re.S
        )
        assert "Traceback" not in err
    assert "error: The command after -- runs" in ends[lacks][2].splitlines()[0]


@pytest.mark.slow
def test_a_command_that_does_not_exist():
    code, _, err = end(start("--max-restarts", "3", command=["no-such-program"]))
    assert code == 64
    assert len(err.splitlines()) == 1
    assert "'no-such-program', which is not found in PATH" in err


@pytest.mark.slow
def test_a_stop_while_ranks_start():
    agent = start("--nproc-per-node", "8", script="import time; time.sleep(60)", quick=False)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    while not children.read_text().strip():
        time.sleep(0.001)
    agent.send_signal(signal.SIGTERM)
    code, _, err = end(agent)
    assert code == 143, err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_rank_that_has_saved_does_not_end_one_that_still_copies(tmp_path):
    """Copying takes longer than the time for ranks that cannot continue."""
    script = (
        "import os, signal, sys, time; rank = int(os.environ['RANK']); "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"rank or (time.sleep(14), open({str(tmp_path / 'copied')!r}, 'w')); sys.exit(143)"
    )
    code, _, err = end(start("--nproc-per-node", "2", script=script))
    assert code == 143, err
    assert (tmp_path / "copied").exists()


def test_settings_that_torch_rejects_are_reported(tmp_path):
    taken = tmp_path / "file"
    taken.touch()
    for words in (["--rdzv-conf", "join_timeout=soon"], ["--log-dir", str(taken)]):
        code, _, err = end(start(*words, command=["true"]))
        assert code == 64, err
        assert words[0] in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_a_failed_doctor_leaves_no_failure_record_in_the_run(tmp_path):
    training = [*FIT, f"run.dir={tmp_path}"]
    doctor = ["python", "-m", "launch.doctor", "--level", "deep", "--", *training]
    code, _, err = end(start(command=doctor))
    assert code == 64, err
    assert not (tmp_path / "failures").exists()


@pytest.mark.slow
def test_the_first_error_of_a_run_is_kept(tmp_path):
    termination = tmp_path / "termination"
    agent = start(
        "--nproc-per-node", "2", "--max-restarts", "3", "--termination-log", str(termination),
        command=[*FIT, f"run.dir={tmp_path / 'run'}", "task.use=tests.faults.tasks:Crashing"],
        env={"TORCHELASTIC_ERROR_FILE": str(tmp_path / "for-torchx.json")},
    )  # fmt: skip
    code, _, err = end(agent)
    assert code == 70
    assert "no such thing" in err
    for path in (termination, tmp_path / "run/failures/0001.json"):
        record = json.loads(path.read_text())
        assert record["exit_code"] == 70
        assert not record["retry"]
        assert "no such thing" in record["first"]["error"]
        assert any("KeyError" in line for line in record["first"]["log"])
    assert not (tmp_path / "run/failures/0002.json").exists()
    told = json.loads((tmp_path / "for-torchx.json").read_text())["message"]["message"]
    assert told.startswith("RunError: Rank ")
    assert "no such thing" in told


@pytest.mark.slow
def test_a_stopped_run_saves_and_the_same_command_resumes(tmp_path):
    command = [*FIT, f"run.dir={tmp_path}", "task.sleep=0.05", "batch.micro_batch_size=6"]
    agent = start("--nproc-per-node", "2", command=command)
    wait_for(tmp_path / "metrics.jsonl")
    time.sleep(1)
    agent.send_signal(signal.SIGTERM)
    code, _, err = end(agent)
    assert code == 143, err
    assert checkpoints(tmp_path)
    assert end(start("--nproc-per-node", "2", command=command))[0] == 0
    assert "all well" in run("verify", tmp_path).stdout
