"""Sections of a report: overview, goodput, samples."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from train.json_files import is_count
from train.report.data import RunData
from train.report.figures import shown, start_of
from train.report.html import Html, join, table, tag
from train.report.timeline import end
from train.runs.summary import placement_of
from train.runs.words import clock, duration

SAMPLES = 800_000
"""The most characters of samples of a run."""
_PNG = b"\x89PNG\r\n\x1a\n"
_SYMBOLS = {
    "finished": "✓", "running": "▶", "stopped": "■", "failed": "✕", "hung": "✕", "dead": "✕",
    "new": "·", "unreadable": "?",
}  # fmt: skip


def overview_section(runs: Sequence[RunData], named: Sequence[str]) -> Html:
    """Who the runs are and how they are: tiles for one run, a table for several."""
    facts = [_facts(run, several=len(runs) > 1) for run in runs]
    if len(runs) == 1:
        (run,) = runs
        tiles = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts[0].items()]
        about = [f"Task {run.task}", f"run {run.id}", f"created {clock(run.created)}"]
        parts = [
            tag("p", " · ".join(about[not run.task :]), class_="note"),
            tag("dl", *tiles, class_="tiles"),
        ]
        if run.state.reason:
            parts.append(
                tag("p", tag("strong", "Reason of the last exit: "), run.state.reason, class_="why")
            )
        return join(parts)
    columns = list(dict.fromkeys(name for each in facts for name in each))
    rows = [
        [
            tag("span", name, class_=f"run-{index % 8}"),
            *(each.get(column, "–") for column in columns),
        ]
        for index, (name, each) in enumerate(zip(named, facts, strict=True))
    ]
    parts = [table("The runs", ["run", *columns], rows)]
    tasks = {run.task for run in runs}
    if len(tasks) > 1:
        note = f"The runs have different tasks: {', '.join(sorted(tasks))}."
        parts.append(tag("p", note, class_="note"))
    for run, name in zip(runs, named, strict=True):
        if run.state.reason:
            parts.append(tag("p", f"Last exit of {name}: {run.state.reason}", class_="why"))
    return join(parts)


def _facts(run: RunData, *, several: bool) -> dict[str, Html]:
    last = run.last_attempt
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    found: dict[str, object] = {
        "State": tag(
            "span", f"{_SYMBOLS[run.state.kind]} {run.state.text}", class_=f"state {run.state.kind}"
        ),
        "Step": f"{run.step:,}{total}",
    }
    evaluated = [name for name in run.metrics.curves if name.startswith("eval/")]
    for name in ["train/loss", *evaluated[:3]]:
        if (curve := run.metrics.curves.get(name)) and curve.last:
            found[name] = shown(curve.last.value)
    if (speed := run.metrics.curves.get("speed/samples_per_second")) and speed.last:
        found["Samples/s"] = shown(speed.last.value)
    found |= {
        "Placement": str(placement_of(last) or "–"),
        "Attempts": f"{len(run.attempts):,}",
        "Last exit": "–" if run.state.code is None else str(int(run.state.code)),
        "Duration": duration(end(run) - start_of(run)),
    }
    if several:
        found |= {"Task": run.task or "–", "Created": clock(run.created), "Id": tag("code", run.id)}
    return {name: tag("span", value) for name, value in found.items()}


def goodput_section(runs: Sequence[RunData], named: Sequence[str]) -> Html:
    """What the wall time was used for: a bar and a table for each run that recorded it."""
    parts = []
    for run, name in zip(runs, named, strict=True):
        if (goodput := run.goodput) is None:
            continue
        if len(runs) > 1:
            parts.append(tag("h3", name))
        total = sum(part.seconds for part in goodput.parts) or 1.0
        shapes, left = [], 0.0
        for index, part in enumerate(goodput.parts):
            width = 100 * part.seconds / total
            title = tag("title", f"{part.name}: {width:.1f} %")
            shapes.append(
                tag(
                    "rect", title, class_=f"part-{index % 12}",
                    x=f"{left:.3f}%", y="6", width=f"{width:.3f}%", height="28",
                )
            )  # fmt: skip
            left += width
        summary = f"Goodput {100 * goodput.ratio:.1f} % of {duration(total)}."
        if goodput.cost:
            summary += f" {goodput.cost}"
        rows = [
            [
                tag("span", part.name, class_=f"key part-{index % 12}"),
                duration(part.seconds),
                f"{100 * part.seconds / total:.1f} %",
            ]
            for index, part in enumerate(goodput.parts)
        ]
        parts += [
            tag("p", summary),
            tag(
                "svg", *shapes,
                class_="bar", role="img", aria_label=summary, width="100%", height="40",
            ),
            table("Where the wall time went", ["part", "time", "share"], rows),
        ]  # fmt: skip
    if not parts:
        return Html("")
    return join([tag("h2", "Goodput"), *parts])


def samples_section(runs: Sequence[RunData], named: Sequence[str]) -> Html:
    """The texts and images that the runs reported, newest first, up to ``SAMPLES``."""
    parts: list[Html] = []
    for index, (run, name) in enumerate(zip(runs, named, strict=True)):
        if len(runs) > 1 and run.samples:
            parts.append(tag("h3", name))
        size, left_out = 0, run.samples_left_out
        for number, values in enumerate(run.samples):
            shapes = join(
                _sample(item, values["step"]) for item in values["items"] if _sample_size(item)
            )
            size += len(shapes)
            if size > SAMPLES:
                left_out += len(run.samples) - number
                break
            summary = tag("summary", f"Step {values['step']:,}")
            parts.append(
                tag(
                    "details", summary, tag("div", shapes, class_="samples"),
                    open=number == 0, id=f"samples-{index}-{values['step']}",
                )
            )  # fmt: skip
        if left_out:
            note = f"The samples of {left_out:,} more steps are in {run.path.name}/samples."
            parts.append(tag("p", note, class_="note"))
    return join(parts) if parts else tag("p", "No run has reported samples.", class_="empty")


def _sample_size(item: Mapping[str, Any]) -> bool:
    return isinstance(item.get("text"), str) or _is_png(item.get("image"))


def _is_png(image: object) -> bool:
    """Whether a value is a PNG in base64: nothing else becomes the address of an image."""
    if not isinstance(image, str) or len(image) > SAMPLES:
        return False
    try:
        return base64.b64decode(image, validate=True).startswith(_PNG)
    except (binascii.Error, ValueError):
        return False


def _sample(item: Mapping[str, Any], step: int) -> Html:
    name = item["name"]
    if not isinstance(item.get("text"), str):
        alt = f"{name} at step {step}"
        image = tag("img", src=f"data:image/png;base64,{item['image']}", alt=alt)
        return tag("figure", image, tag("figcaption", name))
    full = item.get("characters")
    text = item["text"]
    cut = (
        f" (the first {len(text):,} of {full:,} characters)"
        if (is_count(full) and full > len(text))
        else ""
    )
    return tag("figure", tag("figcaption", f"{name}{cut}"), tag("pre", text))
