"""The time line of a report: attempts as bars over the wall time, with marks, and as tables."""

from __future__ import annotations

import time
from collections.abc import Sequence

from train.json_files import is_count
from train.report.data import RunData
from train.report.figures import start_of
from train.report.html import Html, join, table, tag
from train.report.marks import last_step
from train.runs.state import moment
from train.runs.summary import placement_of
from train.runs.words import clock, duration


def timeline_section(runs: Sequence[RunData], named: Sequence[str]) -> Html:
    """Each attempt as a bar over the wall time, with marks, and all of it as tables."""
    longest = max(max((end(run) - start_of(run) for run in runs), default=0.0), 1.0)
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
        begin = moment(run.attempts[number].get("time"))
        if begin is None:
            continue
        left, right = at(begin), at(end_of(run, number))
        label = tag("title", f"Attempt {number}: {duration(end_of(run, number) - begin)}")
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
        f"Time line: {len(run.attempts)} attempts in {duration(end(run) - start)}, "
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
        begin = moment(values.get("time"))
        first = values.get("resumed_from_step")
        end = run.ends.get(number)
        rows.append(
            [
                str(number),
                clock(begin),
                "–" if begin is None else duration(end_of(run, number) - begin),
                f"{first if is_count(first) else 0:,} to "
                f"{last_step(number, run.attempts, run.metrics):,}",
                str(placement_of(values) or "–"),
                str(values.get("micro_batch_size", "–")),
                str(end.code) if end else "–",
                end.reason[:500] if end else "no recorded end",
            ]
        )
    return table("Attempts, with the steps that later ones did not repeat", columns, rows)


def end_of(run: RunData, number: int) -> float:
    """When an attempt ended, as far as that is known."""
    values = run.attempts[number]
    ended = run.ends.get(number)
    known = ended.time if ended else None
    begin = moment(values.get("time")) or run.created
    if known is None and run.state.kind == "running" and number == max(run.attempts):
        known = time.time()
    if known is None and number in run.metrics.attempts:
        known = run.metrics.attempts[number][1].time
    return max(known or begin, begin)


def end(run: RunData) -> float:
    """When the last attempt ended, as far as that is known."""
    ends = [end_of(run, number) for number in run.attempts]
    return max(ends, default=start_of(run))
