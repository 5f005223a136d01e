"""Sections of a report: config, code, environment and data, and what differs between runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from train.code.changes import CODE
from train.code.changes import read as read_changes
from train.config.leaves import leaves, shown_path
from train.report.data import RunData
from train.report.html import Html, join, table, tag
from train.runs.differences import NOT_ENVIRONMENT, code_of, config_rows

ROWS = 2000
"""The most rows of a table."""
PATCH = 100_000
"""The most characters of a patch that are shown."""
ATTEMPTS = 100
"""The most attempts whose code is compared."""
_FEW = 20
"""A longer table is closed until it is opened."""
_VALUE = 400  # characters


def config_section(runs: Sequence[RunData], named: Sequence[str]) -> Html:
    """The config of the newest attempts; of several runs first what differs, as ``isorun compare``
    finds it."""
    configs = [run.config for run in runs]
    if len(configs) == 1 or not all(configs):
        return _compared("Config", "key", configs, named, "config")
    found = config_rows(configs)
    differing = {**found.semantic, **found.non_semantic}
    parts = [
        _differences(f"Config: differences that {effect}", "key", rows, named)
        for effect, rows in (
            ("change results", found.semantic),
            ("do not change results", found.non_semantic),
        )
        if rows
    ]
    if not differing:
        parts.append(tag("p", "Config: the same in all runs.", class_="note"))
    flat = {shown_path(path): _shown(leaf) for path, leaf in leaves(configs[0])}
    same = {
        key: value
        for key, value in flat.items()
        if not any(f"{key}.".startswith((f"{other}.", f"{other}[")) for other in differing)
    }
    return join([*parts, _same("Config", "key", same, "config"), _left_out([*differing, *same])])


def code_section(runs: Sequence[RunData], named: Sequence[str]) -> Html:
    """Code, environment and placement of the newest attempts, and changes between attempts."""
    code = [code_of(run.path, run.last_attempt) for run in runs]
    others = [
        {name: value for name, value in run.last_attempt.items() if name not in NOT_ENVIRONMENT}
        for run in runs
    ]
    parts = [
        _compared("Code", "item", code, named, "code"),
        _compared("Environment and placement", "item", others, named, "environment"),
    ]
    for index, (run, name) in enumerate(zip(runs, named, strict=True)):
        parts += _patch(run, name, f"patch-{index}")
        rows = [
            [f"{number}", str(change)[:_VALUE]]
            for number, values in sorted(run.attempts.items())
            for change in _list(values.get("changes"))
        ]
        if rows:
            caption = f"Config changes between attempts of {name}"
            parts.append(table(caption, ["attempt", "change"], rows[:ROWS]))
        versions = {
            json.dumps(code_of(run.path, values), sort_keys=True)
            for _, values in sorted(run.attempts.items())[-ATTEMPTS:]
        }
        if len(versions) > 1:
            note = f"The attempts of {name} ran {len(versions)} versions of the code."
            parts.append(tag("p", note, class_="note"))
    return join(parts)


def _patch(run: RunData, name: str, id_: str) -> list[Html]:
    """What the code of the newest attempt changes since its commit."""
    changes = read_changes(run.path, max(run.attempts, default=0))
    if changes is None:
        return []
    title = f"Changes of the code since the commit, in the newest attempt of {name}"
    full = changes.text
    shown = full[:PATCH]
    left_out = len(full) - len(shown)
    note = f"{left_out:,} more characters are in {run.path.name}/{CODE}." if left_out else None
    return [
        tag(
            "details",
            tag("summary", f"{title}: {len(changes.files):,} files"),
            tag("pre", shown),
            tag("p", note, class_="note") if note else None,
            id=id_,
        )
    ]


def data_section(runs: Sequence[RunData], named: Sequence[str]) -> Html:
    """What identifies the training data."""
    note = tag(
        "p",
        "The fingerprint is a hash of a few samples; runs with the same data have the same one.",
        class_="note",
    )
    has_one = any("fingerprint" in run.data for run in runs)
    return join([_compared("Data", "item", [run.data for run in runs], named, "data"),
                 note if has_one else None])  # fmt: skip


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _compared(
    caption: str, column: str, values: Sequence[Mapping[str, Any]], named: Sequence[str], id_: str
) -> Html:
    """Nested values, a row for each leaf and a column for each run; rows that differ first."""
    flat = [{shown_path(path): _shown(leaf) for path, leaf in leaves(each)} for each in values]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    if not keys:
        return tag("p", f"{caption}: nothing is recorded.", class_="empty")
    if len(flat) == 1:
        rows: list[list[object]] = [[key, tag("code", flat[0][key])] for key in keys[:ROWS]]
        shown_table = table(caption, [column, "value"], rows)
        if len(rows) > _FEW:
            summary = tag("summary", f"{caption}: {len(rows):,} values")
            shown_table = tag("details", summary, shown_table, id=f"all-{id_}")
        return join([shown_table, _left_out(keys)])
    differing = [key for key in keys if len({each.get(key) for each in flat}) > 1]
    same = [key for key in keys if key not in set(differing)]
    shown: list[Html | None] = []
    if differing:
        rows_of = {key: [each.get(key) for each in flat] for key in differing}
        shown.append(_differences(f"{caption}: differences", column, rows_of, named))
    else:
        shown.append(tag("p", f"{caption}: the same in all runs.", class_="note"))
    alike = {key: flat[0].get(key, "–") for key in same}
    return join([*shown, _same(caption, column, alike, id_), _left_out(keys)])


def _differences(
    caption: str, column: str, rows: Mapping[str, Sequence[Any]], named: Sequence[str]
) -> Html:
    """A row for each name with the value of each run; None where it has none."""
    cells = [
        [tag("mark", key), *(tag("code", "–" if v is None else _shown(v)) for v in values)]
        for key, values in [*rows.items()][:ROWS]
    ]
    return table(caption, [column, *named], cells)


def _same(caption: str, column: str, values: Mapping[str, str], id_: str) -> Html | None:
    """What all runs have alike, closed until it is opened."""
    if not values:
        return None
    rows = [[key, tag("code", value)] for key, value in [*values.items()][:ROWS]]
    return tag(
        "details",
        tag("summary", f"{caption}: {len(values):,} values that are the same"),
        table(f"{caption}: the same in all runs", [column, "value"], rows),
        id=f"same-{id_}",
    )


def _left_out(keys: Sequence[str]) -> Html | None:
    if len(keys) <= ROWS:
        return None
    return tag("p", f"{len(keys) - ROWS:,} more rows are left out.", class_="note")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _VALUE else f"{text[:_VALUE]}… ({len(text):,} characters)"
