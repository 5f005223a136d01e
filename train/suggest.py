"""Words in messages: suggestions for misspelt ones, and lists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The end of a sentence: "; did you mean X?", with the most similar choice, or ".".

    Words may be dotted keys. Keys of the same section are compared by their last part; where
    there is no such section, all keys as a whole; then all by their last part, so that ``lr``
    finds ``optim.lr``. Upper and lower case count only if that finds something.
    """
    section, _, last = word.rpartition(".")
    siblings: dict[str, str] = {}
    others: dict[str, str] = {}
    by_last: dict[str, str] = {}
    for choice in choices:
        where, _, name = choice.rpartition(".")
        if where == section:
            siblings[name] = choice
        elif not word.startswith(f"{choice}."):  # the section itself is right
            others[choice] = choice
            by_last.setdefault(name, choice)
    whole = {} if section and siblings else others
    for fold in (str, str.lower):
        for wanted, among in ((last, siblings), (word, whole), (last, by_last)):
            folded = {fold(name): choice for name, choice in among.items()}
            close = difflib.get_close_matches(fold(wanted), folded, n=1, cutoff=0.65)
            if close:
                return f"; did you mean {folded[close[0]]}?"
    return "."


def listed(words: Sequence[str], most: int = 5, *, separator: str = ", ") -> str:
    """The first ``most`` words, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return separator.join(words[:most]) + more
