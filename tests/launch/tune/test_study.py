"""A study in its storage, without processes: what is sampled, claimed and recorded."""

import functools
import json
import re
import sys
import tempfile

import pytest

from launch.cli import main
from launch.tune.devices import shares
from launch.tune.methods import check_method
from launch.tune.page import write_page
from launch.tune.settings import Settings, parse_objectives
from launch.tune.study import Study
from tests.launch.tune.tuning import BASE, refused
from train.config.space import check_space, load_space
from train.exits import ResumeRefusedError, UsageError

SPACE = """\
optim.lr: {type: float, low: 1.0e-4, high: 1.0e-1, log: true}
optim.use: {type: categorical, choices: [adamw, sgd]}
optim.momentum: {type: float, low: 0.5, high: 0.9, when: {optim.use: sgd}}
ema: {type: categorical, choices: [null, {decay: 0.9}]}
"""
CONFIG = ["task.use=digits", "batch.global_batch_size=32", "length.steps=10"]


@functools.cache
def checked(text):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        space = load_space(file.name)
    return space, check_space(space, [], CONFIG, 1)


@pytest.fixture
def study(tmp_path):
    """Opens the study of a directory."""

    def opened(name="study", text=SPACE, sampler="tpe:n_startup_trials=2", storage=None):
        space, base = checked(text)
        objectives = parse_objectives([], base.values())
        return Study(tmp_path / name, Settings(space, objectives, sampler, "none", base), storage)

    return opened


@pytest.mark.parametrize("sampler", ["tpe:n_startup_trials=2", "random", "gp", "nsgaii"])
def test_what_is_sampled_depends_only_on_the_trials_before(study, sampler):
    whole = study("whole", sampler=sampler)
    values = []
    for number in range(4):
        claim = whole.claim(4)
        values.append(claim.assigned)
        whole.settle(claim, "finished", [float(number)])
    assert whole.claim(4) is None
    assert len({json.dumps(each) for each in values}) > 2

    for number in range(4):  # the process dies after each claim
        dead = study("killed", sampler=sampler)
        dead.give_up(dead.claim(4))
        alive = study("killed", sampler=sampler)
        claim = alive.claim(4)
        assert (claim.number, claim.assigned) == (number, values[number])
        alive.settle(claim, "finished", [float(number)])


def test_a_trial_with_a_part_of_its_values_gets_the_same_rest(study):
    expected = study("whole").claim(1).assigned
    interrupted = study("killed")
    interrupted._study.ask({"optim.lr": optuna_range()})
    claim = interrupted.claim(1)
    assert claim.number == 0
    assert claim.assigned.keys() == expected.keys()


def optuna_range():
    from optuna.distributions import FloatDistribution

    return FloatDistribution(1e-4, 1e-1, log=True)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_two_processes_never_claim_the_same_trial(study, storage):
    one, other = study(storage=storage), study(storage=storage)
    claims = [one.claim(3), other.claim(3), one.claim(3)]
    assert [claim.number for claim in claims] == [0, 1, 2]
    assert one.claim(3) is None
    assert other.claim(3) is None
    other.give_up(claims[1])
    again = one.claim(3)
    assert (again.number, again.assigned) == (1, claims[1].assigned)


def test_an_incomplete_line_of_the_journal_is_removed(study, tmp_path):
    first = study()
    first.settle(first.claim(2), "failed")
    with (tmp_path / "study" / "journal.log").open("a") as file:
        file.write('{"op_code": 4, "wor')
    again = study()
    assert [each.state.name for each in again.trials()] == ["FAIL"]
    assert again.claim(2).number == 1
    assert len(study().trials()) == 2


def test_damaged_files_are_refused_in_one_sentence(study, tmp_path):
    study()
    record = tmp_path / "study" / "study.json"
    text = record.read_text()
    for damage in ("{", "[]", text.replace('"journal"', "3")):
        record.write_text(damage)
        with pytest.raises(ResumeRefusedError, match=r"study\.json is damaged"):
            study()
    record.write_text(text)
    (tmp_path / "study" / "journal.log").write_text("no journal\n" * 3)
    with pytest.raises(ResumeRefusedError, match="storage of the study is damaged"):
        study()


def test_a_grid_has_each_combination_once(study):
    text = "optim.use: {type: categorical, choices: [adamw, sgd]}\n" + (
        "optim.momentum: {type: float, low: 0.5, high: 0.9, step: 0.4, when: {optim.use: sgd}}\n"
    )
    grid = study(text=text, sampler="grid")
    found = [grid.claim(9).assigned for _ in grid.combinations]
    assert found == [
        {"optim.use": "adamw"},
        {"optim.use": "sgd", "optim.momentum": 0.5},
        {"optim.use": "sgd", "optim.momentum": 0.9},
    ]


def test_the_storage_of_a_study_stays(study, tmp_path):
    study(storage="sqlite")
    assert (tmp_path / "study" / "study.db").exists()
    study()
    with pytest.raises(ResumeRefusedError, match="--storage is 'journal', but the study in"):
        study(storage="journal")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["loss:min"]),
        (["accuracy"], ["accuracy:max"]),
        (["eval/bits_per_byte", "top5_acc"], ["bits_per_byte:min", "top5_acc:max"]),
        (["thing:max"], ["thing:max"]),
    ],
)
def test_the_direction_of_common_metrics_is_known(words, expected):
    assert [str(each) for each in parse_objectives(words, {})] == expected


def test_the_default_objective_is_that_of_the_config():
    config = {"early_stop": {"metric": "accuracy", "mode": "max"}}
    assert [str(each) for each in parse_objectives([], config)] == ["accuracy:max"]


def test_places_share_the_gpus_and_the_cores(monkeypatch):
    monkeypatch.setattr("train.process.cores.usable_cores", lambda: 8.0)
    four = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert [each["CUDA_VISIBLE_DEVICES"] for each in shares(2, 2, four)] == ["4,5", "6,7"]
    assert shares(1, 2, four) == [{"OMP_NUM_THREADS": "4"}]
    with pytest.raises(UsageError, match="needs 6 GPUs, but 4 are visible"):
        shares(3, 2, four)
    assert shares(2, 2, {"CUDA_VISIBLE_DEVICES": ""}) == [{"OMP_NUM_THREADS": "2"}] * 2
    assert shares(2, 1, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"}) == [{}] * 2


@pytest.mark.parametrize(
    ("option", "word", "expected"),
    [
        ("pruner", "medain", "did you mean median?"),
        ("sampler", "bayes", "must be one of tpe, random, grid, gp, nsgaii"),
        ("pruner", "median:n_startup=2", "n_startup is not an option of Optuna's MedianPruner; did you"),
        ("pruner", "median:2", "is not of the form option=value"),
        ("pruner", "median:n_startup_trials=-2", "which Optuna's MedianPruner refuses"),
        ("pruner", "percentile", "which Optuna's PercentilePruner refuses"),
        ("sampler", "tpe:seed=3", "seed is not an option"),
        ("sampler", "grid:x=1", "grid takes no options"),
    ],
)  # fmt: skip
def test_an_unknown_method_or_option_is_one_sentence(option, word, expected):
    with pytest.raises(UsageError) as caught:
        check_method(option, word)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "tune needs --space FILE"),
        (["--space", "nowhere.yaml"], "There is no config file or run directory 'nowhere.yaml'"),
        (["--trials", "0"], "--trials must be a whole number of at least 1, but is '0'"),
        (["--parallel", "x"], "--parallel must be a whole number"),
        (["--objective", "acuracy"], "of which it is not known whether less or more is better"),
        (["--objective", "loss:mix"], "did you mean min?"),
        (["--objective", "loss,accuracy"], "write one --objective for each"),
        (["length.steps=6"], "error: length needs exactly one of length.steps and length.epochs"),
        (["--pruner", "median", "evaluate.every_steps=null"], "evaluates only at the end of a run"),
        (["--pruner", "median", "--objective", "loss", "--objective", "accuracy"], "cannot prune"),
        (["evaluate.every_steps=null", "evaluate.at_end=false"], "The config has no evaluation"),
        (["--storage", "file.db"], "must be journal, sqlite, or the URL of a database"),
        (["--storage", "nosql://x/y"], "The storage of the study cannot be used"),
        (["--show", "nowhere"], "There is no study in nowhere"),
        (["--trails", "3"], "'--trails'; did you mean --trials?"),
        (["optim.lrr=3"], "optim.lrr is not a known key (value 3, from command line); did you mean"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, capsys, words, expected):
    file = tmp_path / "space.yaml"
    file.write_text(SPACE)
    space = [] if not words or "--space" in words else ["--space", str(file)]
    code, said = refused(capsys, *BASE, *space, *words, f"run.dir={tmp_path / 'study'}")
    assert code == 64
    assert expected in said
    assert said.count("\n") == 0
    assert not (tmp_path / "study" / "study.json").exists()


def test_the_directory_of_a_run_is_refused(tmp_path, capsys):
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "run.json").write_text("{}")
    words = ["--space", str(tmp_path / "space.yaml"), f"run.dir={tmp_path}"]
    code, said = refused(capsys, *BASE, *words)
    assert code == 64
    assert "which holds a run; choose another directory" in said


@pytest.mark.slow
def test_the_page_of_a_study_is_written_at_any_time(study, tmp_path, capsys):
    working = study(sampler="random")
    for number in range(7):
        claim = working.claim(7)
        working.report(claim, 10, float(number))
        if number < 6:
            working.settle(claim, "finished", [abs(claim.assigned["optim.lr"] - 0.01)])
    target = tmp_path / "page.html"
    words = ["tune", "--show", str(tmp_path / "study"), "--to", str(target)]
    assert main([*words, "--json"]) == 0
    page = target.read_text()
    assert "PED-ANOVA" in page
    assert "best 50 % of the 6 finished trials" in page
    for key in ("optim.lr", "optim.use", "optim.momentum", "ema"):
        assert f">{key}</th>" in page
    shares = [float(text) for text in re.findall(r"<td>([0-9.]+) %</td>", page)]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert "<td>unfinished</td>" in page
    assert "sampler</dt><dd>random</dd>" in page

    target.write_text("notes")
    capsys.readouterr()
    assert main(words) == 64
    assert "which exists and is no report" in capsys.readouterr().err
    assert target.read_text() == "notes"


def test_the_page_says_why_no_importance_is_estimated(study, tmp_path, monkeypatch):
    working = study(sampler="random")
    for number in range(4):
        working.settle(working.claim(4), "finished", [float(number)])
    monkeypatch.setitem(sys.modules, "optuna.importance", None)  # as if a library were missing
    write_page(working, tmp_path / "page.html")
    assert (
        "evaluator needs a library that cannot be imported" in (tmp_path / "page.html").read_text()
    )
