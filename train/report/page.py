"""The page of a report: one HTML file with its styles, its script, uPlot and its data.

Its Content-Security-Policy permits no network access, and only the scripts and styles that are
written here, by their hashes.
"""

from __future__ import annotations

import hashlib
import json
import time
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from train.report.data import RunData
from train.report.figures import Figure, described, drawn, find_figures, labels, table_rows
from train.report.html import Html, join, script_json, table, tag, text
from train.report.records import code_section, config_section, data_section
from train.report.sections import (
    goodput_section,
    overview_section,
    samples_section,
)
from train.report.timeline import timeline_section
from train.version import __version__

UPLOT = "vendor/uplot"


class Parts(NamedTuple):
    """A page in parts, which a page that is watched replaces one by one."""

    html: dict[str, Html]
    """The content of elements by id."""
    drawn: dict[str, Any]
    """What the script draws."""
    figures: Html
    """The plots, without their texts."""
    title: str


def make_parts(runs: Sequence[RunData]) -> Parts:
    """The parts of the page about these runs."""
    figures, left_out = find_figures(runs)
    named = labels(runs)
    html = {
        "overview": overview_section(runs, named),
        "timeline": timeline_section(runs, named),
        "goodput": goodput_section(runs, named),
        "config": config_section(runs, named),
        "code": code_section(runs, named),
        "data-facts": data_section(runs, named),
        "samples": samples_section(runs, named),
    }
    for figure in figures:
        html[f"{figure.id}-about"] = _about(figure, named)
    title = named[0] if len(runs) == 1 else f"{len(runs)} runs compared"
    return Parts(html, drawn(runs, figures), _figures(runs, figures, left_out), title)


def render(runs: Sequence[RunData], *, live: bool = False) -> str:
    """The page about these runs. ``live``: one that asks its server for changes."""
    parts = make_parts(runs)
    style = _asset(f"{UPLOT}/uPlot.min.css") + _asset("assets/report.css")
    licence = f"/*!\n{_asset(f'{UPLOT}/LICENSE')}*/\n"
    scripts = [licence + _asset(f"{UPLOT}/uPlot.iife.min.js"), _asset("assets/report.js")]
    connect = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; script-src {' '.join(_hash(script) for script in scripts)}; "
        f"style-src {_hash(style)}; img-src data:; connect-src {connect}; "
        "base-uri 'none'; form-action 'none'"
    )
    made = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    values = {
        "policy": text(policy),
        "title": text(f"{parts.title} · isorun report"),
        "heading": text(parts.title),
        "made": text(f"Made {made} by isorun {__version__}"),
        "live": "" if not live else _live(),
        "style": style,
        "data": script_json({**parts.drawn, "live": live}),
        "uplot": scripts[0],
        "script": scripts[1],
        "figures": parts.figures,
        "library": text(json.loads(_asset(f"{UPLOT}/vendor.json"))["version"]),
        **parts.html,
    }
    page, *rest = _asset("assets/report.html").split("{{")
    for piece in rest:
        name, _, after = piece.partition("}}")
        page += values[name] + after
    return page


def _live() -> Html:
    return tag("p", "Live: in progress", id="live", role="status")


@cache
def _asset(name: str) -> str:
    return files("train.report").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _figures(runs: Sequence[RunData], figures: Sequence[Figure], left_out: int) -> Html:
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
        tag("figcaption", _about(figure, named), id=f"{figure.id}-about"),
        id=figure.id,
        class_="plot",
        aria_labelledby=title,
    )


def _about(figure: Figure, named: Sequence[str]) -> Html:
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
