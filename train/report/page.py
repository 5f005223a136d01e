"""The page about runs: curves, time line, samples, config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from train.report.data import RunData
from train.report.document import document
from train.report.figures import drawn, find_figures, labels
from train.report.html import Html, tag
from train.report.plots import about, plots_section
from train.report.records import code_section, config_section, data_section
from train.report.sections import (
    goodput_section,
    overview_section,
    samples_section,
)
from train.report.timeline import timeline_section


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
        html[f"{figure.id}-about"] = about(figure, named)
    title = named[0] if len(runs) == 1 else f"{len(runs)} runs compared"
    return Parts(html, drawn(runs, figures), plots_section(runs, figures, left_out), title)


def render(runs: Sequence[RunData], *, live: bool = False) -> str:
    """The page about these runs. ``live``: one that asks its server for changes."""
    parts = make_parts(runs)
    shown = {"live": _live() if live else Html(""), "figures": parts.figures, **parts.html}
    return document("report.html", parts.title, shown, parts.drawn, live=live)


def _live() -> Html:
    return tag("p", "Live: in progress", id="live", role="status")
