"""The page about a study: history, parallel coordinates, importance, and the curves of trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from train.exits import RunError
from train.report.curves import read_metrics
from train.report.data import RunData
from train.report.document import document
from train.report.figures import FEWEST, drawn, find_figures
from train.report.html import Html, join, table, tag
from train.report.plots import plots_section
from train.report.state import State
from train.report.study_data import StudyData, StudyTrial
from train.report.study_plots import history, importance, parallel_coordinates

TRIALS = 100
"""The most trials whose curves are drawn: the best ones, then the first."""
_POINTS = 100_000
"""The most points of all curves."""


def render_study(study: StudyData) -> str:
    """The page as one HTML file. Reads ``metrics.jsonl`` of the trials."""
    chosen = _chosen(study)
    runs = [run for trial in chosen if (run := _curves(study, trial, len(chosen))) is not None]
    figures, left_out = find_figures(runs, TRIALS)
    curves = [plots_section(runs, figures, left_out)]
    without = sum(trial.values is not None for trial in study.trials) - len(runs)
    if without > 0:
        note = (
            f"The curves of {without:,} trials are not shown: only those of the {TRIALS} best, "
            "where their metrics can be read."
        )
        curves.append(tag("p", note, class_="note"))
    parts = {
        "overview": _overview(study),
        "history": join(
            part
            for index, (name, _) in enumerate(study.objectives)
            for part in (tag("h3", name), history(study, index))
        ),
        "parallel": parallel_coordinates(study),
        "importance": importance(study),
        "figures": join(curves),
        "trials": _trials(study.rows),
    }
    return document("study.html", study.name, parts, drawn(runs, figures), live=False)


def _overview(study: StudyData) -> Html:
    tiles = [tag("div", tag("dt", name), tag("dd", value)) for name, value in study.facts.items()]
    parts = [tag("dl", *tiles, class_="tiles")]
    best = [trial for trial in study.trials if trial.number in study.best]
    keys = dict.fromkeys(key for trial in best for key in trial.params)
    if best:
        columns = ["key", *(f"trial {trial.number}" for trial in best)]
        rows = [[key, *(_text(trial.params, key) for trial in best)] for key in keys]
        parts.append(table("Values of the best trials" if len(best) > 1 else
                           "Values of the best trial", columns, rows))  # fmt: skip
    return join(parts)


def _text(params: Mapping[str, float | str], key: str) -> str:
    value = params.get(key, "–")
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _trials(rows: Sequence[Sequence[str]]) -> Html:
    """The table of ``isorun tune``; the mark of the best joins the number."""
    columns = rows[0][1:]
    body = [[f"{row[1]} {row[0]}".strip(), *row[2:]] for row in rows[1:]]
    return table("All trials; * marks the best", columns, body)


def _chosen(study: StudyData) -> list[StudyTrial]:
    """The trials whose curves are drawn, by number."""
    mode = study.objectives[0][1]

    def rank(trial: StudyTrial) -> tuple[bool, float]:
        value = trial.values[0] if trial.values else None
        if value is None:
            return True, 0.0
        return False, value if mode == "min" else -value

    return sorted(sorted(study.trials, key=rank)[:TRIALS], key=lambda trial: trial.number)


def _curves(study: StudyData, trial: StudyTrial, trials: int) -> RunData | None:
    """The training loss and the objectives of a trial; None without any."""
    wanted = {"train/loss", *(f"eval/{name}" for name, _ in study.objectives)}
    with suppress(OSError, RunError):
        metrics = read_metrics(trial.directory / "metrics.jsonl")
        metrics.curves = {name: c for name, c in metrics.curves.items() if name in wanted}
        metrics.left_out = 0
        for curve in metrics.curves.values():
            curve.reduce(max(FEWEST // 2, _POINTS // (trials * len(wanted))))
        if metrics.curves:
            name = f"trial {trial.number}"
            return RunData(
                path=trial.directory, id=name, name=name, created=0.0,
                state=State(trial.state, trial.state), config={}, attempts={}, finished={},
                metrics=metrics, checkpoints=[], marks=[],
            )  # fmt: skip
    return None
