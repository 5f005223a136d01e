"""Sections of a report: overview, time line, goodput, samples."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Mapping, Sequence
from typing import Any

from train.json_files import is_count, is_number
from train.report.curves import valid_time
from train.report.data import RunData
from train.report.figures import shown, start_of
from train.report.html import Html, join, table, tag
from train.report.marks import last_step

SAMPLES = 800_000
"""The most characters of samples of a run."""
_PNG = b"\x89PNG\r\n\x1a\n"
_SYMBOLS = {
    "finished": "✓", "running": "▶", "stopped": "■", "failed": "✕", "ended": "✕", "new": "·",
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
        "Placement": placement(last) or "–",
        "Attempts": f"{len(run.attempts):,}",
        "Last exit": "–" if run.state.code is None else str(int(run.state.code)),
        "Duration": duration(_end(run) - start_of(run)),
    }
    if several:
        found |= {"Task": run.task or "–", "Created": clock(run.created), "Id": tag("code", run.id)}
    return {name: tag("span", value) for name, value in found.items()}


def placement(attempt: Mapping[str, Any]) -> str:
    """Where an attempt ran, in a few words; empty where it does not say."""
    size, device = attempt.get("world_size"), attempt.get("device")
    if not is_count(size):
        return ""
    hosts = attempt.get("hosts")
    count = len(hosts) if isinstance(hosts, list) else 0
    strategy = str(attempt.get("strategy", ""))
    text = f"{size} × {device}"
    text += f" on {count} hosts" if count > 1 else ""
    return text if strategy in ("", "single") else f"{text}, {strategy}"


def timeline_section(runs: Sequence[RunData], named: Sequence[str]) -> Html:
    """Each attempt as a bar over the wall time, with marks, and all of it as tables."""
    longest = max(max((_end(run) - start_of(run) for run in runs), default=0.0), 1.0)
    parts = []
    for index, (run, name) in enumerate(zip(runs, named, strict=True)):
        if len(runs) > 1:
            parts.append(tag("h3", name))
        parts.append(_bar(run, longest))
        parts.append(
            tag(
                "p",
                tag("span", clock(start_of(run))),
                tag("span", f"{duration(longest)} later"),
                class_="ends",
            )
        )
        parts.append(attempts_table(run))
        events = [mark for mark in run.marks if mark.kind in ("fault", "stop", "skipped", "finish")]
        if events:
            parts.append(
                table(
                    f"Faults, stops and the end of {name}",
                    ["step", "time", "what happened"],
                    [[f"{m.step:,}", clock(m.time), _event(m.kind, m.text)] for m in events],
                )
            )
        saved = [f"{checkpoint.step:,}" for checkpoint in run.checkpoints[-100:]]
        kept = f"{len(run.checkpoints):,} checkpoints are on disk" + (
            f", of steps {', '.join(saved)}." if saved else "."
        )
        parts.append(tag("p", kept, class_="note", id=f"checkpoints-{index}"))
    return join(parts)


def _event(kind: str, text: str) -> Html:
    sign = {"fault": "✕ ", "stop": "■ ", "skipped": "○ ", "finish": "✓ "}[kind]
    return tag("span", sign, text, class_=f"event {kind}")


def _bar(run: RunData, longest: float) -> Html:
    start = start_of(run)

    def at(when: float) -> float:
        return 100 * min(max((when - start) / longest, 0.0), 1.0)

    shapes = [Html('<line class="base" x1="0%" x2="100%" y1="24" y2="24"></line>')]
    for number in sorted(run.attempts)[-200:]:
        begin = valid_time(run.attempts[number].get("time"))
        if begin is None:
            continue
        left, right = at(begin), at(_end_of(run, number))
        label = tag("title", f"Attempt {number}: {duration(_end_of(run, number) - begin)}")
        width = max(right - left, 0.3)
        shapes.append(
            tag(
                "rect", label, class_="attempt",
                x=f"{left:.3f}%", y="12", width=f"{width:.3f}%", height="24", rx="3",
            )
        )  # fmt: skip
        if width > 4:
            shapes.append(tag("text", str(number), class_="number", x=f"{left + 0.8:.3f}%", y="29"))
    for mark in run.marks:
        if mark.time is None or mark.kind == "attempt":
            continue
        x, label = f"{at(mark.time):.3f}%", tag("title", mark.text[:200])
        top = "36" if mark.kind == "checkpoint" else "4"
        shapes.append(tag("line", label, class_=mark.kind, x1=x, x2=x, y1=top, y2="44"))
    faults = sum(mark.kind == "fault" for mark in run.marks)
    summary = (
        f"Time line: {len(run.attempts)} attempts in {duration(_end(run) - start)}, "
        f"{faults} faults, {len(run.checkpoints)} checkpoints on disk. The tables below list them."
    )
    return tag(
        "svg", *shapes, class_="bar", role="img", aria_label=summary, width="100%", height="48"
    )


def attempts_table(run: RunData) -> Html:
    """A row for each attempt."""
    columns = [
        "attempt",
        "started",
        "lasted",
        "steps",
        "placement",
        "micro-batch",
        "exit",
        "reason",
    ]
    rows = []
    for number in sorted(run.attempts)[-200:]:
        values = run.attempts[number]
        begin = valid_time(values.get("time"))
        first = values.get("resumed_from_step")
        ended = values.get("ended")
        end: Mapping[str, Any] = ended if isinstance(ended, Mapping) else {}
        rows.append(
            [
                str(number),
                clock(begin),
                "–" if begin is None else duration(_end_of(run, number) - begin),
                f"{first if is_count(first) else 0:,} to "
                f"{last_step(number, run.attempts, run.metrics):,}",
                placement(values),
                str(values.get("micro_batch_size", "–")),
                str(end.get("code", "–")),
                str(end.get("reason") or "no recorded end")[:500],
            ]
        )
    return table("Attempts, with the steps that later ones did not repeat", columns, rows)


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


def _end_of(run: RunData, number: int) -> float:
    """When an attempt ended, as far as that is known."""
    values = run.attempts[number]
    ended = values.get("ended")
    end = valid_time(ended.get("time")) if isinstance(ended, Mapping) else None
    begin = valid_time(values.get("time")) or run.created
    if end is None and run.state.kind == "running" and number == max(run.attempts):
        end = time.time()
    if end is None and number in run.metrics.attempts:
        end = run.metrics.attempts[number][1].time
    return max(end or begin, begin)


def _end(run: RunData) -> float:
    ends = [_end_of(run, number) for number in run.attempts]
    return max(ends, default=start_of(run))


def duration(seconds: float) -> str:
    """A time span for people."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    if hours < 48:
        return f"{hours}:{rest // 60:02d} h" if hours else f"{rest // 60}:{rest % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def clock(when: float | None) -> str:
    """A point in time for people, in the time zone of this machine."""
    if when is None or not is_number(when) or not 0 <= when < 1e11:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
