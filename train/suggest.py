"""Suggestions for misspelt words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The end of a sentence: "; did you mean X?", with the most similar choice, or ".".

    A dotted key is compared as a whole first, then by its last part, so that both
    ``optim.lrr`` and a bare ``lr`` find ``optim.lr``.
    """
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.65)
    if not close:
        last = word.rpartition(".")[2]
        by_last = {c.rpartition(".")[2]: c for c in reversed(choices)}
        found = difflib.get_close_matches(last, by_last, n=1, cutoff=0.65)
        close = [by_last[found[0]]] if found else []
    return f"; did you mean {close[0]}?" if close else "."
