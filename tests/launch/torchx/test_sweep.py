import json
import os
import re
import signal
import sys

import pytest

from launch.contract import STOP_SIGNALS
from launch.torchx import sweep_node
from launch.torchx.sweep import combinations, values
from tests.launch.launching import role
from tests.support.runs import TINY
from train.exits import UsageError


def given(made):
    return json.loads(made.args[-1].replace("$$", "$"))


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("a=1", ["1"]),
        ("a=1,2", ["1", "2"]),
        ("a=[1,2]", ["[1,2]"]),
        ("a=[1,2],[3]", ["[1,2]", "[3]"]),
        ("a='x,y',z", ["'x,y'", "z"]),
        ("a={b: [1,2], c: 3},null", ["{b: [1,2], c: 3}", "null"]),
    ],
)
def test_commas_separate_values_except_within_a_value(word, found):
    assert values(word) == found


def test_the_last_override_varies_fastest():
    assert combinations(["a=1,2", "b=3", "c=4,5"]) == [
        ["a=1", "b=3", "c=4"], ["a=1", "b=3", "c=5"], ["a=2", "b=3", "c=4"], ["a=2", "b=3", "c=5"],
    ]  # fmt: skip


def test_each_run_has_its_own_name_and_directory():
    words = [word for word in TINY if not word.startswith("optim.lr=")]
    made = role("isorun.sweep", "-j", "3x2", *words, "run.dir=/runs/s", "optim.lr=0.1,0.2")
    assert made.num_replicas == 3
    assert made.args[2:4] == ["--share", "${replica_id}/3"]
    assert made.args[4:6] == ["--nproc-per-node", "2"]
    runs = given(made)["runs"]
    assert [run["overrides"][-1] for run in runs] == [
        "run.dir=/runs/s/optim.lr=0.1",
        "run.dir=/runs/s/optim.lr=0.2",
    ]
    assert len({run["overrides"][-2] for run in runs}) == 2
    assert all(run["overrides"][-2].startswith("run.name=") for run in runs)
    assert made.env["WANDB_JOB_TYPE"] == "sweep"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run.seed=1",), "No override has several values"),
        (("run.seed=1,1",), "The override 'run.seed=1,1' has the same value twice"),
        (("run.seed=1,x",), "seed"),
        (("run.seed=1,2", "run.dir=a,b"), "run.dir is 'a,b', but a sweep needs a single directory"),
        (
            (f"run.seed={','.join(map(str, range(1001)))}",),
            "1,001 combinations, more than the limit of 1,000",
        ),
    ],
)
def test_errors_are_reported_before_submission(words, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        role("isorun.sweep", *TINY, *words, scheduler="slurm")


def test_the_largest_sweep_fits_into_one_argument_and_a_larger_one_is_refused():
    """Linux limits one argument to 128 KiB, and local_cwd could not start the job."""
    lots = [
        "optim.lr=" + ",".join(map(str, range(1, 26))),
        "run.seed=" + ",".join(map(str, range(40))),
    ]
    made = role("isorun.sweep", "--check", "False", "--config", "d.yaml", *lots)
    assert len(given(made)["runs"]) == 1000
    assert len(made.args[-1].encode()) < 128 * 1024
    with pytest.raises(
        UsageError, match=r"1,000 runs, and the list .* more than the 131,071 of one"
    ):
        role("isorun.sweep", "--check", "False", *lots, "data.files=/a/long/path/of/a/corpus.txt")


RUNS = json.dumps({"config": [], "runs": [{"overrides": ["run.name=first"]}], "max_restarts": 0})


@pytest.mark.parametrize(
    ("share", "sweep", "expected"),
    [
        ("x/1", RUNS, "--share must be RANK/NODES"),
        ("0", RUNS, "but is '0' (command line)"),
        ("1/1", RUNS, "with RANK less than NODES"),
        ("0/1", "{", "not what `torchx run isorun.sweep` writes"),
        ("0/1", '{"runs": [1], "config": [], "max_restarts": 0}', "isorun.sweep` writes"),
    ],
)
def test_a_wrong_command_line_of_a_node_is_one_sentence(
    monkeypatch, capsys, share, sweep, expected
):
    monkeypatch.setattr(sys, "argv", ["sweep_node", "--share", share, sweep])
    assert sweep_node.main() == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_node_goes_on_if_nobody_reads_its_output(monkeypatch, unread):
    started = []
    monkeypatch.setattr(sweep_node._Runner, "_train", lambda *run: started.append(run[2]) or 64)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["sweep_node", "--share", "0/1", RUNS])
    monkeypatch.setattr(sys, "stdout", unread)
    assert sweep_node.main() == 64
    assert started == ["first"]


def test_an_elastic_sweep_is_refused():
    with pytest.raises(UsageError, match="a sweep cannot be elastic"):
        role("isorun.sweep", "-j", "1:2x1", *TINY, "run.seed=1,2")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_node_forwards_every_request_to_stop_to_its_run(monkeypatch, number):
    """The agent of the run is in a session of its own, so nothing else would tell it."""
    forwarded = []

    class Agent:
        def __init__(self, *_, **__):
            self.send_signal = forwarded.append

        def poll(self):
            return None

        def wait(self):
            os.kill(os.getpid(), number)
            return 143

    monkeypatch.setattr(sweep_node.subprocess, "Popen", Agent)
    runs = [{"name": name, "overrides": [f"run.name={name}"]} for name in ("a", "b")]
    sweep = json.dumps({"config": [], "max_restarts": 0, "runs": runs})
    monkeypatch.setattr(sweep_node.sys, "argv", ["sweep_node", "--share", "0/1", sweep])
    for each in STOP_SIGNALS:  # a background process of a shell ignores some
        signal.signal(each, signal.SIG_DFL)
    assert sweep_node.main() == 143
    assert forwarded == [number]
