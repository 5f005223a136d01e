"""A strategy from outside the package, named by its dotted path."""

import json
import sys

import pytest

from tests.support.forked import command, run
from tests.support.runs import ROOT, TINY, assert_same_bits, tensors
from train.config.load import load_config
from train.exits import UsageError
from train.setup.build import choose_strategy

MODULE = '''
from train import Section
from train.strategies.ddp import DdpStrategy
from train.strategies.single import SingleStrategy


class Wrapped(DdpStrategy):
    class Options(Section):
        note: str = "none"


class Lost(SingleStrategy):
    section = "dpd"


class Plain(SingleStrategy):
    class Options:
        note = "none"


class Noted(SingleStrategy):
    """The full model on one process, with a note in the run directory."""

    class Options(Section):
        note: str = "none"
        """What to write."""

    def run_directory_files(self):
        return {"note.json": {"note": self.options.note, "ranks": self.engine.world_size}}
'''


@pytest.fixture
def project(tmp_path):
    """A user's project; the tiny task is importable from it."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "own_strategy.py").write_text(MODULE)
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["strategy=ddp", "strategy_options={a: 1}"],
            "strategy_options is {'a': 1} (from command line), but the strategy ddp reads the "
            "section ddp;",
        ),
        (
            ["strategy=own_strategy:Wrapped", "strategy_options.note=mine"],
            "whose Options are not read, because its section is 'ddp'",
        ),
        (["strategy=own_strategy:Lost"], "whose options are not a config section"),
        (["strategy=own_strategy:Plain"], "whose options are not a config section"),
    ],
)
def test_options_that_the_strategy_does_not_read_are_refused(
    project, monkeypatch, overrides, expected
):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(UsageError) as caught:
        choose_strategy(load_config([], [*TINY, *overrides], runs=False))
    assert expected in str(caught.value)


def fit(project, *overrides, expect=0):
    words = ["fit", *TINY, "length.steps=6", "run.dir=here", *overrides]
    return command(*words, cwd=project, expect=expect)


def test_an_outside_strategy_trains_like_a_built_in_one(project):
    done = fit(project, "strategy=own_strategy:Noted", "strategy_options.note=mine")
    assert "own_strategy:Noted" in done.stdout
    assert json.loads((project / "here/note.json").read_text()) == {"note": "mine", "ranks": 1}
    attempt = json.loads((project / "here/attempts.jsonl").read_text())
    assert attempt["strategy"] == "own_strategy:Noted"
    run("fit", project / "plain", "length.steps=6")
    assert_same_bits(tensors(project / "plain"), tensors(project / "here"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["strategy=own_strategy:Noted", "strategy_options.nota=1"],
            "strategy_options.nota is not a known key (value 1, from command line); did you mean "
            "strategy_options.note?",
        ),
        (["strategy=own_strategy:Notes"], "has no 'Notes'; did you mean Noted?"),
        (["strategy=json:JSONDecoder"], "subclass of train.strategies.base.Strategy"),
        (["strategy=zero4"], "did you mean zero"),
    ],
)
def test_mistakes_are_reported(project, overrides, expected):
    done = fit(project, *overrides, expect=64)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
