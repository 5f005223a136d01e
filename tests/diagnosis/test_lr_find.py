"""The learning-rate range test."""

import json
import math
import os

import pytest

from tests.diagnosis.test_overfit import BASE
from tests.support.forked import run, run_ranks
from train.diagnosis.learning_rates import Tried, has_diverged, judge, smooth
from train.exits import Exit

LO, HI, STEPS = 1e-5, 1.0, 101


def tried(loss, steps=STEPS):
    """A test in which the loss is a function of the logarithm of the rate, from -5 to 0."""
    exponents = [-5 + 5 * i / (STEPS - 1) for i in range(steps)]
    return [Tried(10**e, loss(e)) for e in exponents]


def falling(exponent):
    return 2.0 - 1.0 / (1.0 + math.exp(-4.0 * (exponent + 2.0)))


def test_the_rate_of_the_steepest_decrease_is_suggested():
    found = judge(tried(falling), LO, HI, STEPS)
    assert math.log10(found.suggestion) == pytest.approx(-2.0, abs=0.15)
    assert "larger --hi" in found.reason


def test_noise_does_not_move_the_suggestion_far():
    noisy = [Tried(rate, loss + 0.03 * (-1) ** i) for i, (rate, loss) in enumerate(tried(falling))]
    found = judge(noisy, LO, HI, STEPS)
    assert math.log10(found.suggestion) == pytest.approx(-2.0, abs=0.3)


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (tried(lambda e: 2.0), "does not fall"),
        (tried(lambda e: 2.0 + 0.1 * math.sin(40 * e)), "does not fall"),
        (tried(lambda e: 2.0 + (e + 5.0), steps=40), "rises from the start"),
        (tried(falling, steps=1), "not finite after step 1, at"),
        (tried(lambda e: 2.0, steps=20), "after step 20, at 8.91e-05, without a rise before"),
        ([], "not finite in the first step"),
    ],
)
def test_without_a_decrease_there_is_no_suggestion(steps, text):
    found = judge(steps, LO, HI, STEPS)
    assert found.suggestion is None
    assert text in found.reason


def test_the_end_of_a_loss_that_diverges():
    losses = [falling(e / 20 - 5) for e in range(70)]
    assert not any(has_diverged(losses[:n]) for n in range(1, 71))
    assert has_diverged([*losses, 30.0, 60.0])
    assert has_diverged([-1.0] * 20 + [50.0, 50.0])  # a loss may be negative


def test_smoothing_keeps_a_straight_line():
    line = [float(x) for x in range(30)]
    assert smooth(line)[5:25] == pytest.approx(line[5:25])


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lr-find")
    words = ["--hi", "100", "--steps", "60", "--to", directory / "plots", "--json"]
    done = run("lr-find", directory / "run", *words, base=BASE)
    return directory, json.loads(done.stdout)


def test_a_rate_is_found_for_a_task(result):
    directory, found = result
    assert 1e-4 < found["suggestion"] < 1.0
    assert len(found["loss"]) == len(found["smoothed"]) == len(found["learning_rate"]) < 60
    assert found["reason"].endswith(".")
    assert "diverges" in found["reason"]
    assert not os.path.lexists(directory / "run")  # no trace in the run


def test_plots_are_written(result):
    directory, found = result
    page = (directory / "plots" / "lr-find.html").read_text()
    assert "<svg" in page
    assert f"optim.lr={found['suggestion']:.2g}" in page
    assert (directory / "plots" / "lr-find.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((directory / "plots" / "lr-find.json").read_text()) == found


def test_two_ranks_find_the_same(result, tmp_path):
    words = ["--hi", "100", "--steps", "60", "--json", "strategy=ddp"]
    main, other = run_ranks(2, "lr-find", tmp_path / "run", *words, base=BASE)
    found = json.loads(main.stdout)
    assert found["loss"][:30] == pytest.approx(result[1]["loss"][:30], rel=1e-4)
    assert other.stdout == ""


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--lo", "1", "--hi", "0.5"], "--lo is 1 and --hi is 0.5"),
        (["--lo", "-1"], "0 < --lo < --hi"),
        (["--hi", "nan"], "0 < --lo < --hi"),
        (["--steps", "3"], "--steps is 3"),
        (["optim.lrr=1"], "did you mean optim.lr"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, words, text):
    done = run("lr-find", tmp_path, *words, base=BASE, expect=Exit.USAGE)
    assert text in done.stderr
