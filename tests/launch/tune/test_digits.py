"""Studies of real runs on digits: killed, pruned, and on several ranks."""

import signal
import time

import pytest

from tests.launch.tune.tuning import facts, shown, start_real
from tests.support.runs import checkpoints, metrics
from train.checkpoint.attempts import Attempts

SEARCH = """\
optim.lr: {type: float, low: 1.0e-3, high: 3.0e-2, log: true}
optim.weight_decay: {type: float, low: 1.0e-4, high: 1.0e-1, log: true}
"""
SPACE = "optim.lr: {type: categorical, choices: [3.0e-3, 1.0e-5, 2.0e-3]}\n"
OPTIONS = [
    "--sampler", "grid", "--objective", "accuracy", "--pruner", "median:n_startup_trials=1",
    "length.epochs=8", "evaluate.every_steps=20", "checkpoint.every_steps=20",
    "batch.micro_batch_size=32", "track.tensorboard=false",
]  # fmt: skip

pytestmark = pytest.mark.slow


def finish(process):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that ran without interruption."""
    directory = tmp_path_factory.mktemp("whole") / "study"
    finish(start_real(directory, SPACE, *OPTIONS))
    return directory


def test_a_trial_that_learns_slowly_is_stopped_with_a_checkpoint(whole):
    assert [t["state"] for t in shown(whole)["trials"]][:2] == ["finished", "pruned"]
    pruned = whole / "trials" / "0001"
    ended = Attempts(pruned / "attempts.jsonl").last()["ended"]
    assert ended["code"] == 143
    assert 20 <= checkpoints(pruned)[-1] < 180
    assert (
        metrics(whole / "trials" / "0000")[-1]["eval/accuracy"]
        == (shown(whole)["trials"][0]["values"][0])
    )


def test_a_study_that_is_killed_five_times_has_the_same_trials(whole, tmp_path):
    study = tmp_path / "study"
    for delay in (2, 4, 1, 3, 5):
        process = start_real(study, SPACE, *OPTIONS)
        time.sleep(delay)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
    finish(start_real(study, SPACE, *OPTIONS))
    assert facts(study) == facts(whole)
    assert (study / "best.yaml").read_text().splitlines()[1:] == (
        (whole / "best.yaml").read_text().splitlines()[1:]
    )


def test_trials_on_two_ranks_have_the_same_results(whole, tmp_path):
    study = tmp_path / "study"
    finish(start_real(study, SPACE, *OPTIONS, "--processes", "2", "strategy=ddp"))
    found = [(each[1], each[2]) for each in facts(study)]
    expected = [(each[1], pytest.approx(each[2], rel=1e-5)) for each in facts(whole)]
    assert found == expected
    attempt = Attempts(study / "trials" / "0000" / "attempts.jsonl").last()
    assert (attempt["world_size"], attempt["strategy"]) == (2, "ddp")


def test_twenty_trials_with_pruning_find_a_better_accuracy_in_fewer_steps_than_full_runs(tmp_path):
    common = [
        "--objective", "accuracy", "length.epochs=4", "evaluate.every_epochs=null",
        "evaluate.every_steps=10", "model.channels=8", "track.tensorboard=false",
    ]  # fmt: skip
    plain = "optim.lr: {type: categorical, choices: [3.0e-3]}\n"  # that of configs/digits.yaml
    finish(start_real(tmp_path / "default", plain, "--sampler", "grid", *common))
    pruner = "median:n_startup_trials=4,n_warmup_steps=15"
    finish(start_real(tmp_path / "study", SEARCH, "--trials", "20", "--pruner", pruner, *common))
    (default,) = shown(tmp_path / "default")["trials"]
    study = shown(tmp_path / "study")
    trials, best = study["trials"], study["trials"][study["best"][0]]
    states = [trial["state"] for trial in trials]
    steps, full = sum(trial["step"] for trial in trials), 20 * default["step"]
    print("|                 | accuracy |  steps | of 20 full runs |")
    print(
        f"| default         | {default['values'][0]:8.4f} | {default['step']:6} |                 |"
    )
    print(f"| best of 20      | {best['values'][0]:8.4f} | {steps:6} | {steps / full:15.2f} |")
    print(f"| 20 full runs    |          | {full:6} | {1:15.2f} |")
    print(f"{states.count('finished')} finished, {states.count('pruned')} pruned; {best['params']}")
    assert len(states) == 20
    assert set(states) == {"finished", "pruned"}
    assert best["values"][0] > default["values"][0]
    assert steps < full
