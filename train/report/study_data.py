"""What the page about a study of hyperparameters shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class StudyAxis:
    """A key that the trials vary."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """Whether its scale is logarithmic."""
    choices: Sequence[str] = ()
    """The texts of its values, if it is no range."""


@dataclass(frozen=True)
class StudyTrial:
    """A trial and its result."""

    number: int
    state: str
    """finished, pruned, failed or unfinished."""
    values: Sequence[float | None] | None
    """One per objective; of a pruned trial, those of its last evaluation; None without any."""
    params: Mapping[str, float | str]
    """By key: numbers of ranges, texts of choices."""
    directory: Path
    """The run directory."""


@dataclass(frozen=True)
class StudyData:
    """A study."""

    name: str
    facts: Mapping[str, str]
    """What the overview shows, by name."""
    objectives: Sequence[tuple[str, str]]
    """Name of the metric without ``eval/``, and min or max."""
    axes: Sequence[StudyAxis]
    trials: Sequence[StudyTrial]
    best: Sequence[int]
    """Numbers of trials."""
    rows: Sequence[Sequence[str]]
    """The table of all trials; the first row has the names of the columns."""
    importance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The share of each key, from 0 to 1, by objective."""
    about_importance: str = ""
    """How it was estimated, or why it was not."""
