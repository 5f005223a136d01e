"""The columns of the table of runs, its order and its filters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from train.exits import UsageError
from train.runs.state import STATES
from train.runs.summary import Summary, value_at
from train.runs.table import drawn
from train.runs.tail import Value
from train.runs.words import duration
from train.suggest import did_you_mean
from train.tasks.registry import BUILT_IN


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    name: str
    cell: Callable[[Summary, float], str]
    """The text for a run, at a time in seconds since the epoch; empty where it is not known."""
    key: Callable[[Summary], Any]
    """What runs are sorted by; None where it is not known."""


def _path(run: Summary, _: float) -> str:
    return str(run.path)


def _step(run: Summary, _: float) -> str:
    if run.step is None and run.total_steps is None:
        return ""
    return f"{run.step or 0}/{'?' if run.total_steps is None else run.total_steps}"


def _best(run: Summary, _: float) -> str:
    return ("" if run.best_is_of_all else "~") + shown_value(run.best) if run.best else ""


def _exit(run: Summary, _: float) -> str:
    end = run.condition.end
    return f"{end.code} {end.name}".strip() if end else ""


def _age(run: Summary, now: float) -> str:
    age = run.age(now)
    return "" if age is None else duration(age)


def _newest_first(run: Summary) -> float | None:
    last = run.condition.last_sign
    return None if last is None else -last


def _number(value: Value | None) -> float | None:
    return None if value is None or math.isnan(value.value) else value.value


# Another column needs one line here, and a key in Summary.to_json.
COLUMNS = {
    column.name: column
    for column in (
        Column("run", _path, lambda run: str(run.path)),
        Column("state", lambda run, _: run.state, lambda run: list(STATES).index(run.state)),
        Column("step", _step, lambda run: run.step),
        Column("best", _best, lambda run: _number(run.best)),
        Column("last", lambda run, _: shown_value(run.last), lambda run: _number(run.last)),
        Column(
            "placement",
            lambda run, _: str(run.placement or ""),
            lambda run: run.placement and (run.placement.ranks, str(run.placement)),
        ),
        Column("attempts", lambda run, _: str(run.attempts or ""), lambda run: run.attempts),
        Column(
            "goodput",
            lambda run, _: "" if run.goodput is None else f"{run.goodput:.0f} %",
            lambda run: run.goodput,
        ),
        Column("exit", _exit, lambda run: run.condition.end and run.condition.end.code),
        Column("age", _age, _newest_first),
    )
}


_LEFT_OUT = ("goodput", "attempts", "placement", "last", "exit")
"""The columns that a narrow terminal does not show, the first of them first."""
_SHORTEST_PATH = 24


def shown_value(value: Value | None) -> str:
    """A metric without ``eval/``, as text."""
    if value is None:
        return ""
    return f"{value.metric.removeprefix('eval/')} {value.value:.4g} @{value.step}"


def ordered(runs: Iterable[Summary], by: str) -> list[Summary]:
    """The runs by a column, with ``-`` before its name from the largest to the smallest; those for
    which it is not known come last. Raises UsageError."""
    name = by.removeprefix("-")
    if name not in COLUMNS:
        raise UsageError(
            f"--sort is {by!r}, but the columns are {', '.join(COLUMNS)}"
            f"{did_you_mean(name, COLUMNS)}"
        )
    key = COLUMNS[name].key
    known = [(key(run), run) for run in runs]
    found = sorted(
        (pair for pair in known if pair[0] is not None),
        key=lambda pair: pair[0],
        reverse=by.startswith("-"),
    )
    return [run for _, run in found] + [run for value, run in known if value is None]


def rows(runs: Sequence[Summary], now: float, left_out: Sequence[str] = ()) -> list[list[str]]:
    """The table with its header; ``-`` where a value is not known."""
    columns = [column for column in COLUMNS.values() if column.name not in left_out]
    body = [[column.cell(run, now) or "-" for column in columns] for run in runs]
    return [[column.name for column in columns], *body]


def lines(runs: Sequence[Summary], now: float, width: int | None) -> list[str]:
    """The lines of the table. Where they are wider than ``width``, some columns are left out and
    the paths are cut."""
    for count in range(len(_LEFT_OUT) + 1):
        table = rows(runs, now, _LEFT_OUT[:count])
        spare = max(0, max(len(row[0]) for row in table) - _SHORTEST_PATH)
        if width is None or max(map(len, drawn(table, None))) - spare <= width:
            break
    return drawn(table, width)


def in_states(runs: Iterable[Summary], states: Sequence[str]) -> list[Summary]:
    """The runs in one of the states; all if there are none. Raises UsageError for an unknown
    state."""
    for state in states:
        if state not in STATES:
            raise UsageError(
                f"--state is {state!r}, but the states are {', '.join(STATES)}"
                f"{did_you_mean(state, STATES)}"
            )
    return [run for run in runs if not states or run.state in states]


def of_task(runs: Iterable[Summary], task: str) -> list[Summary]:
    """The runs of a task: a built-in name, a dotted path, or the name of its class."""

    def is_it(use: str | None) -> bool:
        path = BUILT_IN.get(use or "", use or "")
        return task in (use, path) or path.endswith(f":{task}") or BUILT_IN.get(task) == path

    return [run for run in runs if is_it(run.task)]


def where(runs: Sequence[Summary], key: str, text: str) -> list[Summary]:
    """The runs whose config has a value, written in YAML, at a dotted key. Raises UsageError for a
    key that no run has."""
    wanted = _parsed(key, text)
    found, known = [], False
    for run in runs:
        try:
            value = value_at(run.config, key)
        except KeyError:
            continue
        known = True
        if _equal(value, wanted, text):
            found.append(run)
    if runs and not known:
        from train.config.compose import flatten  # imports OmegaConf

        keys: Mapping[str, None] = {key: None for run in runs for key in flatten(run.config)}
        raise UsageError(f"No run has the config key {key}{did_you_mean(key, keys)}")
    return found


def _parsed(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UsageError(f"The value of {key}={text} cannot be read as YAML; quote it.") from None
    try:
        return float(text) if isinstance(value, str) else value  # YAML 1.1 takes 1e-3 for a text
    except ValueError:
        return value


def _equal(value: Any, wanted: Any, text: str) -> bool:
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    return bool(value == wanted) or (isinstance(value, str) and value == text)
