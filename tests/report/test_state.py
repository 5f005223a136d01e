"""The state of a run, from what is in its directory."""

import pytest

from tests.support.report_files import write_run
from train.report.data import read_run
from train.report.sections import _SYMBOLS
from train.report.state import in_words
from train.runs.state import STATES, Condition, End


@pytest.mark.parametrize("state", STATES)
def test_each_state_of_a_run_has_words_and_a_symbol(state):
    found = in_words(Condition(state, End(75, "RETRY", "because"), 0.0))
    assert found.kind == state
    assert found.text
    assert _SYMBOLS[state]
    assert (found.code is None) == (state == "running"), "then the end is that of another attempt"
    assert in_words(Condition(state, None, 0.0)).reason == ""


def test_a_stop_is_marked_at_the_step_that_the_next_attempt_resumed_from(tmp_path):
    write_run(tmp_path, every=7)
    marks = {mark.kind: mark.step for mark in read_run(tmp_path).marks}
    assert marks["stop"] == 260
    assert marks["fault"] == 100
