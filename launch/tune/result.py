"""What a study has found: a table, JSON, and the config of the best trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial

from launch.contract import drawn, replace_text
from launch.tune.stored_study import STATES, StoredStudy
from launch.tune.study import Study
from launch.tune.values import as_text, assigned_in

BEST_FILE = "best.yaml"


def to_json(study: StoredStudy) -> dict[str, Any]:
    """What ``--json`` prints; docs/tuning.md describes the keys."""
    return {
        "study": str(study.directory),
        "objectives": [{"name": each.name, "direction": each.mode} for each in study.objectives],
        "best": [each.number for each in study.best()],
        "trials": [_trial(study, each) for each in study.trials()],
    }


def table(study: StoredStudy, width: int | None) -> list[str]:
    """The lines of a table of all trials, the best ones marked."""
    return drawn(rows(study), width)


def rows(study: StoredStudy) -> list[list[str]]:
    """The cells of that table, with the names of the columns first."""
    names = [each.name for each in study.objectives]
    keys = [each.key for each in study.space.dimensions]
    best = {each.number for each in study.best()}
    found = [["", "trial", "state", *names, "step", *keys, "exit", "time"]]
    for each in (_trial(study, frozen) for frozen in study.trials()):
        values = each["values"] or [None] * len(names)
        code = each["exit"] and each["exit"]["code"]
        found.append(
            [
                "*" if each["number"] in best else "",
                str(each["number"]),
                each["state"],
                *map(_shown, values),
                _shown(each["step"]),
                *(_shown(each["params"].get(key, "")) for key in keys),
                "-" if code is None else f"{code} {each['exit']['name']}",
                "-" if each["seconds"] is None else f"{each['seconds']:.0f} s",
            ]
        )
    return found


def write_best(study: Study, files: Sequence[str], overrides: Sequence[str]) -> Path | None:
    """Writes the config of the best trial, for ``fit``; with several objectives, of the best in the
    first one. Returns the file; None without a finished trial."""
    with study.locked():
        best = study.best()
        if not best:
            return None
        path = study.directory / BEST_FILE
        text = _best_config(study, best[0], files, overrides)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            replace_text(path, text)
        return path


def _best_config(
    study: StoredStudy, frozen: FrozenTrial, files: Sequence[str], overrides: Sequence[str]
) -> str:
    """The config of a trial as YAML, for a run of its own."""
    values = study.space.load(files, overrides, assigned_in(study.space, frozen)).values()
    values["run"] |= {"name": f"{values['run']['name']}-best", "dir": ""}
    results = ", ".join(
        f"{each.name} {_shown(value)}"
        for each, value in zip(study.objectives, frozen.values, strict=True)
    )
    head = f"# Trial {frozen.number} of the study in {study.directory}: {results}\n"
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _trial(study: StoredStudy, frozen: FrozenTrial) -> dict[str, Any]:
    facts: Mapping[str, Any] = frozen.user_attrs
    code = facts.get("exit_code")
    values = [v if math.isfinite(v) else None for v in frozen.values] if frozen.values else None
    ended = frozen.datetime_complete
    return {
        "number": frozen.number,
        "state": STATES[frozen.state],
        "values": values,
        "step": facts.get("step", frozen.last_step),
        "params": assigned_in(study.space, frozen),
        "exit": None
        if code is None
        else {"code": code, "name": facts.get("exit"), "reason": facts.get("reason")},
        "retries": facts.get("retries", 0),
        "directory": str(study.run_directory(frozen.number)),
        "started": frozen.datetime_start and frozen.datetime_start.timestamp(),
        "ended": ended and ended.timestamp(),
        "seconds": ended
        and frozen.datetime_start
        and (ended - frozen.datetime_start).total_seconds(),
    }


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return as_text(value)
