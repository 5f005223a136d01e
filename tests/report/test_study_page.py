"""The page about a study: what it says, and that nothing of a study acts in it."""

import dataclasses
import math
import re

import pytest

from tests.report.test_page import ATTACK, Page
from tests.support.report_files import write_run
from train.report.study import render_study
from train.report.study_data import StudyAxis, StudyData, StudyTrial


def made(tmp_path, **changes):
    """A study of four trials, the third pruned and the last one failed."""
    values = [[0.5], [0.9], [0.2], None]
    states = ["finished", "finished", "pruned", "failed"]
    params = [
        {"optim.lr": 0.001, "optim.use": "adamw"},
        {"optim.lr": 0.01, "optim.use": "sgd", "optim.momentum": 0.9},
        {"optim.lr": 0.1, "optim.use": "adamw"},
        {"optim.lr": 0.1, "optim.use": "adamw"},
    ]
    trials = [
        StudyTrial(n, states[n], values[n], params[n], tmp_path / f"{n:04}") for n in range(4)
    ]
    for n in range(3):
        write_run(tmp_path / f"{n:04}", f"digits-{n}", steps=100)
    study = StudyData(
        name="Study digits",
        facts={"trials": "4", "sampler": "tpe"},
        objectives=[("accuracy", "max")],
        axes=[
            StudyAxis("optim.lr", 0.001, 0.1, log=True),
            StudyAxis("optim.use", choices=["adamw", "sgd"]),
            StudyAxis("optim.momentum", 0.5, 0.99),
        ],
        trials=trials,
        best=[1],
        rows=[["", "trial", "state", "accuracy"], ["*", "1", "finished", "0.9"]],
        importance={"accuracy": {"optim.lr": 0.75, "optim.use": 0.25}},
        about_importance="By the evaluator.",
    )
    return dataclasses.replace(study, **changes)


def page_of(study):
    html = render_study(study)
    page = Page(html)
    assert not page.errors, page.errors
    assert not page.open, page.open
    return page, html


def lines(page, name):
    """The attributes of elements whose class begins with a word."""
    return [attrs for _, attrs in page.tags if str(attrs.get("class", "")).split()[:1] == [name]]


def test_the_page_shows_history_paths_importance_and_all_curves(tmp_path):
    page, html = page_of(made(tmp_path))
    for text in (
        "Study digits", "sampler tpe", "optim.momentum 0.9", "1 * finished 0.9",
        "trial 1, finished: accuracy 0.9; optim.lr=0.01, optim.use=sgd, optim.momentum=0.9",
        "By the evaluator.", "75 %", "not set",
    ):  # fmt: skip
        assert text in page.text, text
    dots = [dot["class"] for dot in lines(page, "dot")]
    assert dots == ["dot finished", "dot best", "dot pruned"], "one that failed has no result"
    paths = lines(page, "path")
    assert [path["class"].split()[1] for path in paths] == ["finished", "pruned", "best"]
    heights = [[float(p.split(",")[1]) for p in path["points"].split()] for path in paths]
    best = heights[2]
    assert best[0] == pytest.approx((320 + 56) / 2), "0.01 is the middle of a logarithmic scale"
    assert best[1] == 56
    assert heights[0][2] > 320, "a key that is not set is below its axis"
    (so_far,) = lines(page, "best-so-far")
    assert len({point.split(",")[1] for point in so_far["points"].split()}) == 2
    figures = page.data["figures"]
    assert [figure["title"] for figure in figures] == ["Loss", "accuracy"]
    assert [[one["run"] for one in figure["series"]] for figure in figures] == [[0, 1, 2]] * 2
    assert [run["label"] for run in page.data["runs"]] == ["trial 0", "trial 1", "trial 2"]
    assert not re.search(r'(src|href)="(?!#)', html), "the page needs no other file"
    assert "default-src &#x27;none&#x27;" in html


def test_values_that_are_far_off_do_not_hide_the_others(tmp_path):
    values = [0.5, 0.4, 0.6, 1e9, 0.45]
    trials = [
        StudyTrial(n, "finished", [value], {}, tmp_path / "none") for n, value in enumerate(values)
    ]
    study = made(tmp_path, trials=trials, objectives=[("loss", "min")], best=[1])
    page, _ = page_of(study)
    heights = [float(dot["cy"]) for dot in lines(page, "dot")]
    assert heights[1] - heights[2] > 50
    assert "Values beyond the scale (1) are drawn at its edge." in page.text
    assert "The curves of 5 trials are not shown" in page.text


def test_a_study_without_results_has_a_page(tmp_path):
    for trials in ([], [StudyTrial(0, "unfinished", None, {"optim.lr": 0.01}, tmp_path)]):
        study = made(
            tmp_path, trials=trials, best=[], importance={}, about_importance="Not estimated."
        )
        page, _ = page_of(study)
        assert "No trial has reported accuracy yet." in page.text
        assert "Not estimated." in page.text
        assert "No metrics are logged yet." in page.text


def test_values_that_are_not_finite_are_left_out(tmp_path):
    trials = [StudyTrial(n, "pruned", [v], {}, tmp_path) for n, v in enumerate([math.nan, 1.0])]
    page, _ = page_of(made(tmp_path, trials=trials, best=[]))
    assert len(lines(page, "dot")) == len(lines(page, "path")) == 1


def test_no_text_of_a_study_becomes_an_element(tmp_path):
    study = made(
        tmp_path,
        name=ATTACK,
        facts={ATTACK: ATTACK},
        objectives=[(ATTACK, "max")],
        axes=[StudyAxis(ATTACK, choices=[ATTACK, "x"])],
        trials=[StudyTrial(0, ATTACK, [1.0], {ATTACK: ATTACK}, tmp_path / "none"),
                StudyTrial(1, "finished", [1.0], {ATTACK: ATTACK}, tmp_path / "none")],
        best=[1],
        rows=[["", "trial", ATTACK], ["*", "1", ATTACK]],
        importance={ATTACK: {ATTACK: 1.0}},
        about_importance=ATTACK,
    )  # fmt: skip
    page, html = page_of(study)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "evil()" in page.text
    assert "\u202e" not in html
