"""Successive halving: which trials pause, and which go on from their checkpoints."""

import json
import math

import pytest

from launch.history import launch_log
from launch.tune.checked import length_dependent_schedule
from launch.tune.halving import HalvingPruner, RungTrial
from launch.tune.settings import Settings, parse_objectives
from launch.tune.study import Study
from tests.launch.tune.test_study import checked
from tests.launch.tune.tuning import BASE, refused, run, run_jobs, shown, starts

GRID = "optim.lr: {type: categorical, choices: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]}\n"
STEPS = 18
# The space and the options of a study of three trials, of which one goes on.
HALVED = (
    "optim.lr: {type: categorical, choices: [1.0, 0.6, 0.3]}\n",
    "--sampler", "grid", "--pruner", "halving:min_steps=2,factor=3",
)  # fmt: skip


def opened(directory, text=GRID, halving="halving:min_steps=2,factor=3", sampler="grid"):
    space, base = checked(text)
    objectives = parse_objectives(["loss:min"], base.values())
    return Study(directory, Settings(space, objectives, sampler, halving, base), None)


def work(directory, limit, *, killed=False):
    """Trains the trials, of which number 2 is the best; a trial takes 2 steps, 6, or all 18.
    Returns the steps of each claim, from and to. ``killed``: a new process for each claim."""
    study, taken = opened(directory), []
    while (claim := study.claim(limit)) is not None:
        level = claim.promoted
        first = max(claim.reported, default=0)
        last = min(study.halving.rung(claim.number, level), STEPS)
        taken.append((claim.number, first, last))
        study.report(claim, last, 1.0 - claim.number * 4 % 9 / 10)
        if last == STEPS:
            study.settle(claim, "finished", [1.0 - claim.number * 4 % 9 / 10])
        else:
            claim.note(paused=level)
            study.give_up(claim)
        if killed:
            study = opened(directory)
    return taken


def states(directory):
    return [trial["state"] for trial in shown(directory)["trials"]]


@pytest.mark.parametrize("killed", [False, True])
def test_the_best_of_each_rung_go_on_and_no_step_is_repeated(tmp_path, killed):
    taken = work(tmp_path / "study", 9, killed=killed)
    assert taken[:4] == [(0, 0, 2), (1, 0, 2), (2, 0, 2), (2, 2, 6)], "the best of three goes on"
    assert (2, 6, 18) in taken, "the best of all is trained to the end"
    for number in range(9):
        pieces = [(first, last) for n, first, last in taken if n == number]
        assert pieces == [(0, 2), (2, 6), (6, 18)][: len(pieces)]
    found = states(tmp_path / "study")
    assert found[2] == "finished"
    assert set(found) == {"finished", "pruned"}
    assert found.count("finished") == 1
    assert shown(tmp_path / "study")["best"] == [2]
    assert sum(last - first for _, first, last in taken) < 9 * STEPS / 2


@pytest.mark.parametrize("trials", [1, 2])
def test_a_small_study_still_has_a_result(tmp_path, trials):
    work(tmp_path / "study", trials)
    assert states(tmp_path / "study") == ["pruned"] * (trials - 1) + ["finished"]


def test_a_larger_study_goes_on_with_new_trials(tmp_path):
    work(tmp_path / "study", 3)
    taken = work(tmp_path / "study", 5)
    assert {number for number, _, _ in taken} == {3, 4}
    assert set(states(tmp_path / "study")) == {"finished", "pruned"}


def test_values_that_are_not_finite_are_the_worst():
    halving = HalvingPruner(min_steps=10, factor=2)
    reports = [{10: math.nan}, {10: 3.0}, {12: 2.0, 20: 9.0}, {9: 0.0}]
    trials = [RungTrial(n, each, 0, is_paused=True) for n, each in enumerate(reports)]
    for mode, expected in (("min", 2), ("max", 1)):
        (first,) = halving.promotable(trials, mode, at_least_one=False)
        assert first.number == expected, "the first evaluation from the rung on counts"


def test_brackets_skip_rungs_and_are_compared_by_themselves():
    halving = HalvingPruner(min_steps=10, factor=3, brackets=3)
    numbers = [halving.bracket(n) for n in range(34)]
    assert numbers[:17] == numbers[17:] == [0] * 9 + [1] * 5 + [2] * 3, "as in Hyperband"
    assert [halving.rung(n, 1) for n in (0, 9, 14)] == [30, 90, 270]
    losses = {0: 5.0, 1: 6.0, 2: 7.0, 9: 1.0, 10: 2.0, 14: 0.5}
    trials = [
        RungTrial(n, {halving.rung(n, 0): loss}, 0, is_paused=True) for n, loss in losses.items()
    ]
    found = halving.promotable(trials, "min", at_least_one=False)
    assert [each.number for each in found] == [0], "the others have not enough to compare"
    found = halving.promotable(trials, "min", at_least_one=True)
    assert [each.number for each in found] == [14, 9, 0], "those with the most steps first"


def test_trials_that_run_on_are_not_trials_that_pause(tmp_path):
    study = opened(tmp_path / "study")
    running = [study.claim(2), study.claim(2)]
    assert study.claim(2) is None
    for claim in running:
        study.report(claim, 2, 0.5)
    running[0].note(paused=0)
    study.give_up(running[0])
    assert study.claim(2) is None, "the other one may still be better"
    study.settle(running[1], "failed")
    again = study.claim(2)
    assert (again.number, again.promoted) == (0, 1)


def test_a_trial_that_another_process_is_pausing_is_waited_for(tmp_path):
    one, other = opened(tmp_path / "study"), opened(tmp_path / "study")
    claims = [one.claim(2), one.claim(2)]
    for claim, value in zip(claims, (0.9, 0.1), strict=True):
        one.report(claim, 2, value)
        claim.note(paused=0)
    one.give_up(claims[0])
    assert other.claim(2) is None, "the better one has not stopped yet"
    assert states(tmp_path / "study") == ["unfinished"] * 2
    one.give_up(claims[1])
    assert other.claim(2).number == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("length.steps: {type: int, low: 10, high: 20}\n", ""),
        ("schedule.use: {type: categorical, choices: [constant, cosine]}\n", "cosine"),
    ],
)
def test_schedules_that_depend_on_the_length_are_known(text, said):
    space, base = checked(text)
    assert length_dependent_schedule(Settings(space, (), "random", "none", base)) == said


@pytest.mark.parametrize(
    ("pruner", "said"),
    [
        ("halving", "min_steps must be a whole number of at least 1"),
        ("halving:min_steps=4,factor=1", "factor must be a whole number of at least 2"),
        ("halving:min_steps=4,brackets=0", "brackets must be a whole number of at least 1"),
        ("halving:min_steps=4,brackets=99", "brackets must be less with this factor"),
        ("halving:min_step=4", "did you mean min_steps"),
    ],
)
def test_wrong_rungs_are_refused_before_anything_starts(tmp_path, capsys, pruner, said):
    (tmp_path / "space.yaml").write_text(GRID)
    words = ["--space", str(tmp_path / "space.yaml"), f"run.dir={tmp_path / 'study'}"]
    code, text = refused(capsys, *BASE, *words, "--pruner", pruner)
    assert code == 64
    assert said in text
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_paused_jobs_are_submitted_again_as_the_same_run(tmp_path):
    said = run_jobs(tmp_path / "study", *HALVED, step=0.6)
    assert "trial 0 paused at step 2" in said
    assert [trial["state"] for trial in shown(tmp_path / "study")["trials"]][2] == "finished"
    assert [starts(tmp_path / "study", n) for n in range(3)] == [1, 1, 2]
    runs = [line["run_id"] for line in launch_log.read() if line["event"] == "submitted"]
    assert len(runs) == 4
    assert runs[2] == runs[3]


@pytest.mark.slow
def test_paused_runs_resume_from_their_checkpoints(tmp_path):
    said = run(tmp_path / "study", *HALVED, step=0.2)
    assert "The schedule cosine depends on the length of the run" in said
    assert "trial 0 paused at step 2" in said
    assert "trial 2 goes on" in said
    found = shown(tmp_path / "study")["trials"]
    assert [trial["state"] for trial in found] == ["pruned", "pruned", "finished"]
    assert found[0]["exit"]["code"] == 143
    assert [starts(tmp_path / "study", n) for n in range(3)] == [1, 1, 2]
    for number in range(3):
        rows = (tmp_path / "study" / "trials" / f"{number:04}" / "metrics.jsonl").read_text()
        steps = [json.loads(row)["step"] for row in rows.splitlines()]
        assert steps == sorted(set(steps))
        assert (steps[-1] == 6) == (number == 2)
