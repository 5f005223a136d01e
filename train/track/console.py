"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

_log = logging.getLogger("train")


def _print_directly() -> None:
    """In a forked data worker: the bar's thread, which may have held the bar's lock, is gone."""
    sys.stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)


os.register_at_fork(after_in_child=_print_directly)


class Console(Protocol):
    """A place for what is said to the person."""

    def print(self, text: str) -> None:
        """Text for the person."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step, of training or of an evaluation."""

    def progress(self, step: int) -> None:
        """After every step."""

    def close(self) -> None:
        """Nothing more will come."""


class EtaEstimator:
    """Steps per second since this attempt's first step, the last minute counting most."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._step = self._time = -1.0
        self._steps = self._seconds = 0.0

    def seconds_left(self, step: int) -> float | None:
        """An estimate, from the calls so far; None where there is nothing to go by.

        The first call starts the clock: the first step is slow, and nobody waits for it again.
        """
        now = time.monotonic()
        if self._time >= 0 and step > self._step:
            steps, seconds = step - self._step, now - self._time
            keep = math.exp(-seconds / 60.0)
            self._steps = self._steps * keep + steps
            self._seconds = self._seconds * keep + seconds
        self._step, self._time = step, now
        return self._seconds / self._steps * (self.total_steps - step) if self._steps else None


class PlainConsole:
    """One line per call, for log files, pipes and clusters."""

    def __init__(self, unit: str, total_steps: int) -> None:
        self.unit, self.total_steps = unit, total_steps
        self._pace = EtaEstimator(total_steps)
        self._begun = False

    def print(self, text: str) -> None:
        """Text for the person."""
        print(text, flush=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Training metrics on one line with ETA, evaluation metrics on one of their own."""
        line = format_metrics(metrics, self.unit)
        if "train/loss" in metrics:
            left = self._pace.seconds_left(step)
            line += f"  eta {_duration(left)}" if left is not None else ""
        self.print(f"step {step}/{self.total_steps}  {line}")

    def progress(self, step: int) -> None:
        """Nothing to be seen between two lines."""
        if not self._begun:
            self._begun = True
            self._pace.seconds_left(step)

    def close(self) -> None:
        """Nothing to be put away."""


class BarConsole:
    """A progress bar; all else is printed above it."""

    def __init__(self, unit: str, total_steps: int, start_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.table import Column
        from rich.text import Text

        class Numbers(ProgressColumn):
            """All other columns are whole; this one gives way where the terminal is narrow."""

            def render(self, task: Task) -> Text:
                return Text(task.fields["numbers"], no_wrap=True, overflow="ellipsis")

        self.unit, self.total_steps = unit, total_steps
        self._pace = EtaEstimator(total_steps)
        console = Console(file=sys.stdout, highlight=False)
        self._progress = Progress(
            TextColumn(f"{{task.completed}}/{total_steps}"),
            BarColumn(max(4, min(40, console.width - 76)), table_column=Column(no_wrap=True)),
            Numbers(),
            TextColumn("{task.fields[times]}"),
            console=console,
            redirect_stderr=sys.stderr.isatty(),
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=start_step, numbers="", times=""
        )
        self._started = self._shown = 0.0
        self._step = start_step

    def print(self, text: str) -> None:
        """Text above the bar, or below it when it has come to its end."""
        if self._step >= self.total_steps:
            self.close()
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Training metrics on the bar, evaluation metrics above it."""
        line = format_metrics(metrics, self.unit)
        if "train/loss" in metrics:
            self._progress.update(self._task, numbers=line.replace("  ", " "))
        else:
            self.print(f"step {step}/{self.total_steps}  {line}")

    def progress(self, step: int) -> None:
        """Moves the bar; it is drawn four times a second by a thread of its own."""
        self._step, now = step, time.monotonic()
        if now - self._shown < 0.2:
            return
        if not self._shown:
            self._started = now
            self._progress.start()
        self._shown = now
        left = self._pace.seconds_left(step)
        self._show(f"eta {_duration(left)}" if left is not None else "")

    def _show(self, left: str) -> None:
        times = f"{_duration(time.monotonic() - self._started)} {left}"
        self._progress.update(self._task, completed=self._step, times=times)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._started:
            self._show("")
            self._progress.stop()
            self._started = 0.0


class QuietConsole:
    """Says nothing; warnings come from elsewhere."""

    def print(self, text: str) -> None:
        """Says nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Says nothing."""

    def progress(self, step: int) -> None:
        """Shows nothing."""

    def close(self) -> None:
        """Nothing to be put away."""


class GuardedConsole:
    """A console that goes quiet, with a warning in the log file, when it fails: the reader at
    the other end of the pipe may have left, and that is no reason to stop."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def _call(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            if isinstance(error, OSError):
                _silence(sys.stdout)
            self._console = QuietConsole()
            _log.warning("The console failed and shows nothing any more: %r", error)

    def print(self, text: str) -> None:
        """Text for the person."""
        self._call(self._console.print, text)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step."""
        self._call(self._console.log, step, metrics)

    def progress(self, step: int) -> None:
        """After every step."""
        self._call(self._console.progress, step)

    def close(self) -> None:
        """Nothing more will come."""
        self._call(self._console.close)


def open_console(kind: str, unit: str, total_steps: int, start_step: int) -> GuardedConsole:
    """The console that ``track.console`` asks for."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # generated text has any character
    if kind == "auto":
        terminal = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        kind = "bar" if terminal else "plain"
    if kind == "bar":
        return GuardedConsole(BarConsole(unit, total_steps, start_step))
    return GuardedConsole(PlainConsole(unit, total_steps) if kind == "plain" else QuietConsole())


def format_metrics(metrics: Mapping[str, float], unit: str) -> str:
    """The metrics that a person wants to see at a glance, in one line."""
    if "train/loss" not in metrics:
        return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    parts = [f"loss {metrics['train/loss']:.4f}"]
    if "train/learning_rate" in metrics:
        parts.append(f"lr {metrics['train/learning_rate']:.1e}")
    for name in dict.fromkeys(("samples", unit)):
        rate = metrics.get(f"speed/{name}_per_second")
        if rate is not None:
            parts.append(f"{_short(rate)} {name}/s")
    if metrics.get("train/skipped_steps"):
        parts.append(f"skipped {metrics['train/skipped_steps']:.0f}")
    return "  ".join(parts)


def _short(value: float) -> str:
    for limit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{sign}"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _silence(stream: Any) -> None:
    """Sends the rest to nowhere; else the interpreter fails at its exit, when it flushes."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass
