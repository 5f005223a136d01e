"""Trials as TorchX jobs: submitted, watched, cancelled, and found again, with runs that take no
time; the last test has real ones, on two ranks."""

import json
import signal

import pytest

from launch.history import launch_log
from tests.launch.tune.tuning import (
    BASE,
    alive,
    facts,
    refused,
    run,
    run_jobs,
    shown,
    start_jobs,
    start_real,
    starts,
    wait_for,
)
from tests.support.runs import checkpoints
from train.checkpoint.attempts import Attempts

LR = "optim.lr: {type: float, low: 1.0e-2, high: 1.0, log: true}\n"


def submissions():
    """The commands and states of the jobs in the launch log."""
    return [line for line in launch_log.read() if line["event"] == "submitted"]


def ends():
    return [line["state"] for line in launch_log.read() if line["event"] == "ended"]


@pytest.mark.slow
def test_each_exit_code_of_a_job_has_its_meaning(tmp_path):
    codes = [0, 65, 71, 75, 64, 1]
    space = f"data.split_seed: {{type: categorical, choices: {codes}}}\n"
    said = run_jobs(
        tmp_path / "study", space, "-j", "1x2", "--sampler", "grid", "--retries", "1",
        "optim.lr=0.3", expect=64,
    )  # fmt: skip
    assert "error: Trial 4 ended with a config error, which ends the study" in said
    trials = shown(tmp_path / "study")["trials"]
    assert [t["state"] for t in trials] == ["finished", "failed", "pruned", "finished", "failed"]
    assert [t["exit"]["code"] for t in trials] == [0, 65, 71, 0, 64]
    assert [starts(tmp_path / "study", n) for n in range(5)] == [1, 1, 1, 2, 1]
    jobs = submissions()
    assert len(jobs) == 6
    assert jobs[0]["command"][-1] == f"run.dir={tmp_path / 'study' / 'trials' / '0000'}"
    assert jobs[0]["env"]["WANDB_RUN_GROUP"] == "digits"
    assert jobs[3]["run_id"] == jobs[4]["run_id"], "a retry is the same run"
    assert len({job["run_id"] for job in jobs}) == 5


@pytest.mark.slow
def test_a_pruned_job_is_cancelled_and_trials_are_those_of_local_processes(tmp_path):
    space = "optim.lr: {type: categorical, choices: [0.31, 0.3, 1.0]}\n"
    options = ["--sampler", "grid", "--pruner", "median:n_startup_trials=2"]
    said = run_jobs(tmp_path / "jobs", space, *options, step=0.6)
    assert "trial 2 pruned at step 2" in said
    found = shown(tmp_path / "jobs")
    assert found["trials"][2]["exit"]["code"] == 143
    assert not (tmp_path / "jobs" / "trials" / "0002" / "finished.json").exists()
    assert ends() == ["SUCCEEDED", "SUCCEEDED", "CANCELLED"]
    run(tmp_path / "local", space, *options, step=0.3)
    assert facts(tmp_path / "jobs") == facts(tmp_path / "local")


@pytest.mark.slow
def test_the_jobs_of_a_killed_controller_are_found_and_not_submitted_twice(tmp_path):
    options = ["--trials", "3", "--parallel", "2", "--sampler", "random"]
    process = start_jobs(tmp_path / "study", LR, *options, step=1)
    files = [tmp_path / "study" / "trials" / f"000{n}" / "state" for n in (0, 1)]
    wait_for(lambda: all(file.exists() for file in files))
    process.kill()
    process.wait()
    pids = [int((file.parent / "starts").read_text()) for file in files]
    assert all(map(alive, pids))
    said = run_jobs(tmp_path / "study", LR, *options, step=0.01)
    assert "trial 0 goes on: local_cwd://" in said
    assert [t["state"] for t in shown(tmp_path / "study")["trials"]] == ["finished"] * 3
    assert [starts(tmp_path / "study", n) for n in range(3)] == [1, 1, 1]
    assert len(submissions()) == 3


@pytest.mark.slow
def test_a_signal_stops_local_jobs_and_leaves_them_to_the_next_start(tmp_path):
    process = start_jobs(tmp_path / "study", LR, "--trials", "1", step=0.5)
    state = tmp_path / "study" / "trials" / "0000" / "state"
    wait_for(state.exists)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "Stopped: 0 of 1 trials have ended" in said
    run_jobs(tmp_path / "study", LR, "--trials", "1")
    (trial,) = shown(tmp_path / "study")["trials"]
    assert (trial["state"], trial["retries"]) == ("finished", 0)
    assert starts(tmp_path / "study", 0) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-s", "slrum"], "--scheduler is 'slrum', but must be one of "),
        (["-s", "local_cwd", "-j", "2y2"], "-j is '2y2', but must be NODESxPROCESSES"),
        (["-s", "slurm", "-cfg", "partion=x"], "partion is not an option of slurm (-cfg partion=x); did you mean partition?"),
        (["-s", "local_cwd", "--job", "gpus=1"], "--job is 'gpus=1', but must be an argument of isorun.fit as NAME=VALUE; did you mean gpu?"),
        (["-s", "local_cwd", "--job", "cpu=x"], "cpu"),
        (["-s", "slurm", "--job", "env=WANDB_API_KEY=abc"], "WANDB_API_KEY"),
        (["-s", "local_cwd", "--job", "h=nothing"], "nothing"),
        (["-s", "local_cwd", "--processes", "2"], "--processes 2 is for trials on this machine"),
        (["-j", "2x2"], "a trial on this machine has one node"),
        (["-cfg", "a=b"], "-cfg a=b is for trials that are jobs"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_before_anything_is_submitted(tmp_path, capsys, words, expected):
    (tmp_path / "space.yaml").write_text(LR)
    code, said = refused(
        capsys, *BASE, "--space", str(tmp_path / "space.yaml"), *words,
        f"run.dir={tmp_path / 'study'}",
    )  # fmt: skip
    assert code == 64
    assert expected in said
    assert said.count("\n") == 0
    assert not (tmp_path / "study" / "study.json").exists()


@pytest.mark.slow
def test_trials_on_two_ranks_are_jobs(tmp_path):
    options = [
        "-s", "local_cwd", "-j", "1x2", "--sampler", "grid", "--objective", "accuracy",
        "--pruner", "median:n_startup_trials=1", "length.epochs=4", "evaluate.every_steps=20",
        "checkpoint.every_steps=20", "batch.micro_batch_size=16", "track.tensorboard=false",
        "strategy=ddp",
    ]  # fmt: skip
    space = "optim.lr: {type: categorical, choices: [3.0e-3, 1.0e-5]}\n"
    process = start_real(tmp_path / "study", space, *options)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert [t["state"] for t in shown(tmp_path / "study")["trials"]] == ["finished", "pruned"]
    pruned = tmp_path / "study" / "trials" / "0001"
    attempt = Attempts(pruned / "attempts.jsonl").last()
    assert (attempt["world_size"], attempt["strategy"]) == (2, "ddp")
    assert attempt["ended"]["code"] == 143
    assert checkpoints(pruned)
    assert json.loads((pruned / "run.json").read_text())["id"] == submissions()[1]["run_id"]
