"""Splits parametrised matrices into two lanes: some cases that cover each value, and all cases."""

import pytest


def thinned(cases, *, kept):
    """The cases of a matrix for ``parametrize``. ``kept`` (a function of a case, or a list of
    cases) selects those for ``make test``; only ``make test-all`` runs the others."""
    holds = kept if callable(kept) else kept.__contains__
    return [case if holds(case) else slow(case) for case in cases]


def slow(case):
    """A case that only ``make test-all`` runs."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
