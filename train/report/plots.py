"""The plots of a report as HTML: their legends, their texts, and the tables of their values."""

from __future__ import annotations

from collections.abc import Sequence

from train.report.data import RunData
from train.report.figures import Figure, described, labels, table_rows
from train.report.html import Html, join, table, tag


def plots_section(runs: Sequence[RunData], figures: Sequence[Figure], left_out: int) -> Html:
    """All plots, and notes about what is left out. ``left_out``: plots beyond the limit."""
    if not figures:
        return tag("p", "No metrics are logged yet.", class_="empty")
    named, parts, section = labels(runs), list[Html](), ""
    for figure in figures:
        if figure.section != section:
            if section:
                parts.append(Html("</div>"))
            section = figure.section
            parts += [tag("h3", section), Html('<div class="plots">')]
        parts.append(_figure(figure, named))
    parts.append(Html("</div>"))
    if left_out:
        parts.append(tag("p", f"{left_out:,} more plots are left out.", class_="note"))
    for run, name in zip(runs, named, strict=True):
        if run.metrics.left_out:
            note = f"{name}: {run.metrics.left_out:,} more metrics are left out."
            parts.append(tag("p", note, class_="note"))
        if run.metrics.damaged:
            note = f"{name}: {run.metrics.damaged:,} lines of metrics.jsonl are no rows."
            parts.append(tag("p", note, class_="note"))
    return join(parts)


def _figure(figure: Figure, named: Sequence[str]) -> Html:
    one = len(named) == 1
    summary = " ".join(described(s, "" if one else f"{named[s.run]} ") for s in figure.series[:6])
    title = f"{figure.id}-title"
    tools = [tag("button", "Reset zoom", type="button", class_="reset", hidden=True)]
    if figure.is_positive:
        tools.insert(
            0, tag("button", "Log scale", type="button", class_="log", aria_pressed="false")
        )
    unit = tag("span", figure.unit, class_="unit") if figure.unit else None
    return tag(
        "figure",
        tag(
            "div",
            tag("h4", figure.title, " " if unit else "", unit, id=title),
            tag("div", *tools, class_="tools"),
            class_="head",
        ),
        tag("div", class_="legend", role="group", aria_label=f"Curves of {figure.title}"),
        tag(
            "div",
            class_="canvas",
            tabindex="0",
            role="img",
            aria_label=f"Plot of {figure.title}. {summary} The left and right arrow keys read it.",
        ),
        tag("p", class_="readout", aria_live="off"),
        tag("figcaption", about(figure, named), id=f"{figure.id}-about"),
        id=figure.id,
        class_="plot",
        aria_labelledby=title,
    )


def about(figure: Figure, named: Sequence[str]) -> Html:
    """The curves of a plot in sentences and as a table. ``named``: a label for each run."""
    one = len(named) == 1
    prefixes = ["" if one else f"{name} " for name in named]
    sentences = [described(series, prefixes[series.run]) for series in figure.series]
    if figure.left_out:
        sentences.append(f"{figure.left_out:,} more curves are left out.")
    if figure.buckets > 1:
        sentences.append(
            f"Drawn are the lowest and the highest value of each {figure.buckets:,} steps."
        )
    columns = ["step", *(f"{prefixes[series.run]}{series.metric}" for series in figure.series)]
    return tag(
        "details",
        tag("summary", "Summary and values"),
        tag("ul", *(tag("li", sentence) for sentence in sentences)),
        table(
            f"{figure.title}: values at some steps, or at the last logged step before",
            columns,
            table_rows(figure),
        ),
        id=f"{figure.id}-values",
    )
