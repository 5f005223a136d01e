"""What tune makes of the ends of trials, and of its own, with runs that take no time."""

import json
import signal

import pytest

from tests.launch.tune.tuning import alive, facts, run, shown, start, starts, wait_for

LR = "optim.lr: {type: float, low: 1.0e-2, high: 1.0, log: true}\n"


def test_each_exit_code_has_its_meaning_and_a_config_error_ends_the_study(tmp_path):
    codes = [0, 65, 70, 71, 75, 137, 78, 64, 1]
    space = f"data.split_seed: {{type: categorical, choices: {codes}}}\n"
    options = ["--sampler", "grid", "--retries", "1", "optim.lr=0.3"]
    said = run(tmp_path / "study", space, *options, expect=64)
    assert "isorun: error: Trial 7 ended with a config error, which ends the study" in said
    assert "the reason is usage" in said
    trials = shown(tmp_path / "study")["trials"]
    states = ["finished", "failed", "failed", "pruned", "finished", "failed", "failed", "failed"]
    assert [trial["state"] for trial in trials] == states
    assert [trial["exit"]["code"] for trial in trials] == [0, 65, 70, 71, 0, 137, 78, 64]
    assert trials[1]["exit"]["name"] == "DATA"
    assert trials[1]["exit"]["reason"] == "the reason is data."
    assert [starts(tmp_path / "study", n) for n in range(8)] == [1, 1, 1, 1, 2, 2, 1, 1]
    assert "retry 1 of 1 in 1 s" in said

    said = run(tmp_path / "study", space, *options)  # the study goes on with its next trial
    assert "trial 8 finished" in said
    assert len(shown(tmp_path / "study")["trials"]) == 9
    assert starts(tmp_path / "study", 7) == 1
    table = [line.split() for line in said.splitlines()]
    assert any(row[:2] == ["3", "pruned"] and "71" in row for row in table)


@pytest.mark.slow
def test_a_study_that_is_killed_gives_the_same_trials(tmp_path):
    options = ["--trials", "8", "--pruner", "median:n_startup_trials=2", "--sampler",
               "tpe:n_startup_trials=3"]  # fmt: skip
    space = LR + "model.channels: {type: int, low: 8, high: 32, step: 8}\n"
    run(tmp_path / "whole", space, *options)
    whole = facts(tmp_path / "whole")
    assert {state for _, state, *_ in whole} == {"finished", "pruned"}
    for number in range(5):
        process = start(tmp_path / "killed", space, *options, step=0.05)
        directory = tmp_path / "killed" / "trials" / f"{number:04}"
        wait_for((directory / "metrics.jsonl").exists)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        pid = int((directory / "starts").read_text().split()[-1])
    run(tmp_path / "killed", space, *options)
    assert facts(tmp_path / "killed") == whole
    assert not alive(pid)


def test_the_processes_of_a_killed_tune_stop(tmp_path):
    process = start(tmp_path / "study", LR, "--trials", "1", step=0.2)
    beginning = tmp_path / "study" / "trials" / "0000" / "starts"
    wait_for(lambda: beginning.exists() and beginning.read_text())
    process.kill()
    process.wait()
    pid = int(beginning.read_text())
    wait_for(lambda: not alive(pid), 10)
    assert not (beginning.parent / "finished.json").exists()


@pytest.mark.slow
def test_a_signal_stops_the_trials_and_leaves_them_to_the_next_start(tmp_path):
    options = ["--trials", "3", "--parallel", "2"]
    process = start(tmp_path / "study", LR, *options, step=0.1)
    files = [tmp_path / "study" / "trials" / f"000{n}" / "state" for n in (0, 1)]
    wait_for(lambda: all(file.exists() for file in files))
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "Stopped: 0 of 3 trials have ended; the same command goes on." in said
    assert [t["state"] for t in shown(tmp_path / "study")["trials"]] == ["unfinished"] * 2
    said = run(tmp_path / "study", LR, *options)
    assert "trial 0 goes on" in said
    assert [t["state"] for t in shown(tmp_path / "study")["trials"]] == ["finished"] * 3
    assert [starts(tmp_path / "study", n) for n in range(3)] == [2, 2, 1]


@pytest.mark.slow
def test_two_processes_on_one_storage_share_the_trials(tmp_path):
    options = ["--trials", "6", "--sampler", "random", "--storage", "sqlite"]
    both = [start(tmp_path / "study", LR, *options, step=0.05) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [t["state"] for t in shown(tmp_path / "study")["trials"]] == ["finished"] * 6
    assert [starts(tmp_path / "study", n) for n in range(6)] == [1] * 6
    begun = [sum(f"trial {n} starts" in text for n in range(6)) for text in said]
    assert sum(begun) == 6
    assert min(begun) > 0


@pytest.mark.slow
def test_a_pruned_trial_is_asked_to_stop_and_the_best_one_is_written(tmp_path, capsys):
    space = "optim.lr: {type: categorical, choices: [0.31, 0.3, 1.0]}\n"
    options = ["--sampler", "grid", "--pruner", "median:n_startup_trials=2"]
    said = run(tmp_path / "study", space, *options, step=0.3)
    assert "trial 2 pruned at step 2" in said
    found = shown(tmp_path / "study")
    assert found["best"] == [1]
    assert found["trials"][2]["exit"] == {"code": 143, "name": "PREEMPTED", "reason": None}
    assert found["trials"][2]["values"] == [0.7 + 1 / 2]
    assert not (tmp_path / "study" / "trials" / "0002" / "finished.json").exists()
    page = (tmp_path / "study" / "study.html").read_text()
    assert "trial 2, pruned: loss 1.2; optim.lr=1.0" in page
    assert "2 trials have finished, and at least 4 are needed" in page
    best = tmp_path / "study" / "best.yaml"
    assert best.read_text().startswith("# Trial 1 of the study in ")
    from train.config.load import load_config

    loaded = load_config([str(best)], [], runs=False)
    assert loaded.config.optim.lr == 0.3
    assert loaded.config.run.name == "digits-best"
    assert loaded.config.run.dir == ""


def test_several_objectives_give_a_front(tmp_path):
    space = "optim.lr: {type: categorical, choices: [0.3, 0.5]}\n"
    options = ["--sampler", "grid", "--objective", "loss", "--objective", "accuracy"]
    said = run(tmp_path / "study", space, *options, "evaluate.every_steps=null")
    assert "loss:min, accuracy:max" in said
    found = shown(tmp_path / "study")
    assert found["best"] == [0]
    assert found["objectives"][1] == {"name": "accuracy", "direction": "max"}
    assert len(found["trials"][1]["values"]) == 2


@pytest.mark.slow
def test_an_objective_that_is_not_reported_ends_the_study_until_it_is_corrected(tmp_path):
    said = run(tmp_path / "study", LR, "--trials", "1", "--objective", "losss:min", expect=64)
    assert "objective of the study is 'losss', but the task's evaluation reports only" in said
    assert "did you mean loss" in said
    run(tmp_path / "study", LR, "--trials", "1", "--objective", "loss")
    assert [t["state"] for t in shown(tmp_path / "study")["trials"]] == ["finished"]


@pytest.mark.slow
def test_other_settings_are_refused_and_more_trials_are_not(tmp_path):
    run(tmp_path / "study", LR, "--trials", "1")
    said = run(tmp_path / "study", LR.replace("1.0, log", "2.0, log"), "optim.weight_decay=0.5",
               "--objective", "accuracy", expect=76)  # fmt: skip
    assert "space: optim.lr: " in said
    assert "optim.weight_decay: 0.01 -> 0.5" in said
    assert "objectives: " in said
    assert said.count("isorun: error") == 1
    out = run(tmp_path / "study", LR, "--trials", "2", "--json", "track.log_every_steps=7")
    found = json.loads(out[out.index("{\n") : out.rindex("}") + 1])
    assert [trial["state"] for trial in found["trials"]] == ["finished"] * 2
