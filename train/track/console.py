"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any


class PlainConsole:
    """One line per call, for log files, pipes and clusters."""

    def __init__(self, unit: str, total_steps: int, start_step: int) -> None:
        self.unit, self.total_steps, self.start_step = unit, total_steps, start_step
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """Text for the person."""
        print(text, flush=True)

    def warn(self, text: str) -> None:
        """The same, on standard error."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Training metrics on one line with ETA, evaluation metrics on one of their own."""
        line = describe(metrics, self.unit)
        if "train/loss" in metrics:
            line = f"{line}  eta {_duration(self._seconds_left(step))}"
        self.say(f"step {step}/{self.total_steps}  {line}")

    def _seconds_left(self, step: int) -> float:
        done = max(1, step - self.start_step)
        return (time.monotonic() - self.started) / done * (self.total_steps - step)

    def progress(self, step: int) -> None:
        """Nothing to be seen between two lines."""

    def close(self) -> None:
        """Nothing to be put away."""


class BarConsole(PlainConsole):
    """A progress bar; all else is printed above it."""

    def __init__(self, unit: str, total_steps: int, start_step: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        super().__init__(unit, total_steps, start_step)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TimeElapsedColumn(),
            console=Console(file=sys.stdout, highlight=False),
            refresh_per_second=4,
        )
        self._task: Any = None

    def say(self, text: str) -> None:
        """Text above the bar."""
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning above the bar."""
        self._progress.console.print(f"warning: {text}", markup=False, style="yellow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Training metrics on the bar, evaluation metrics above it."""
        if "train/loss" in metrics:
            self._update(step, numbers=describe(metrics, self.unit))
        else:
            super().log(step, metrics)

    def progress(self, step: int) -> None:
        """Moves the bar; it is drawn four times a second by a thread of its own."""
        self._update(step)

    def _update(self, step: int, **fields: Any) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(
                "", total=self.total_steps, completed=self.start_step, numbers=""
            )
        self._progress.update(self._task, completed=step, **fields)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._progress.stop()


class QuietConsole(PlainConsole):
    """Only warnings."""

    def say(self, text: str) -> None:
        """Says nothing."""


def make_console(kind: str, unit: str, total_steps: int, start_step: int) -> PlainConsole:
    """The console that ``track.console`` asks for."""
    if kind == "auto":
        kind = "bar" if sys.stdout.isatty() else "plain"
    classes = {"bar": BarConsole, "plain": PlainConsole, "quiet": QuietConsole}
    return classes[kind](unit, total_steps, start_step)


def describe(metrics: Mapping[str, float], unit: str) -> str:
    """The metrics that a person wants to see at a glance, in one line."""
    if "train/loss" not in metrics:
        return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    parts = [f"loss {metrics['train/loss']:.4f}", f"lr {metrics['train/learning_rate']:.2e}"]
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
    return f"{value:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
