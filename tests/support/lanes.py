"""Parametrised matrices in two lanes: a few cases that cover each value, and all of them."""

import pytest


def thinned(cases, *, kept):
    """The cases of a matrix for ``parametrize``; those for which ``kept`` does not hold are left to
    ``make test-all``. ``kept`` is a function of a case, or a list of cases."""
    holds = kept if callable(kept) else kept.__contains__
    return [case if holds(case) else slow(case) for case in cases]


def slow(case):
    """A case that only ``make test-all`` has."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
