"""Console output of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from train.process.emergency_output import silence
from train.visible import visible

_log = logging.getLogger("train")


def _print_directly() -> None:
    """Removes rich's proxies in a forked data worker, where the bar's lock may stay locked."""
    sys.stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)


os.register_at_fork(after_in_child=_print_directly)


class Console(Protocol):
    """Output for the user."""

    def print(self, text: str) -> None:
        """Prints a text."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of a step, from training or evaluation."""

    def progress(self, step: int) -> None:
        """Updates the progress; called after every step."""

    def close(self) -> None:
        """Ends the output."""


class EtaEstimator:
    """Estimates the remaining time from the steps of this attempt.

    Steps per second are an exponential average with a time constant of 60 s.
    """

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._step = self._time = -1.0
        self._steps = self._seconds = 0.0

    def seconds_left(self, step: int) -> float | None:
        """Seconds to the end of the run; None before the second call.

        The first call only starts the clock, so that the slow first step does not count.
        """
        now = time.monotonic()
        if self._time >= 0 and step > self._step:
            steps, seconds = step - self._step, now - self._time
            decay = math.exp(-seconds / 60.0)
            self._steps = self._steps * decay + steps
            self._seconds = self._seconds * decay + seconds
        self._step, self._time = step, now
        return self._seconds / self._steps * (self.total_steps - step) if self._steps else None


class PlainConsole:
    """One line per call, for log files, pipes and clusters."""

    def __init__(self, unit: str, total_steps: int) -> None:
        self.unit, self.total_steps = unit, total_steps
        self._eta = EtaEstimator(total_steps)
        self._started = False

    def print(self, text: str) -> None:
        """Prints a text."""
        # One write, because sinks print in another thread.
        print(f"{text}\n", end="", flush=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Training metrics on one line with ETA, evaluation metrics on one of their own."""
        line = format_metrics(metrics, self.unit)
        if "train/loss" in metrics:
            left = self._eta.seconds_left(step)
            line += f"  eta {_duration(left)}" if left is not None else ""
        self.print(f"step {step}/{self.total_steps}  {line}")

    def progress(self, step: int) -> None:
        """Starts the clock of the ETA at the first call."""
        if not self._started:
            self._started = True
            self._eta.seconds_left(step)

    def close(self) -> None:
        """Does nothing."""


class BarConsole:
    """A progress bar; texts are printed above it."""

    def __init__(self, unit: str, total_steps: int, start_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.table import Column
        from rich.text import Text

        class Numbers(ProgressColumn):
            """The metrics; the only column that is truncated on a narrow terminal."""

            def render(self, task: Task) -> Text:
                return Text(task.fields["numbers"], no_wrap=True, overflow="ellipsis")

        self.unit, self.total_steps = unit, total_steps
        self._eta = EtaEstimator(total_steps)
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
        """Prints a text above the bar, or below it after the last step."""
        if self._step >= self.total_steps:
            self.close()
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows training metrics in the bar, evaluation metrics above it."""
        line = format_metrics(metrics, self.unit)
        if "train/loss" in metrics:
            self._progress.update(self._task, numbers=line.replace("  ", " "))
        else:
            self.print(f"step {step}/{self.total_steps}  {line}")

    def progress(self, step: int) -> None:
        """Moves the bar, at most five times a second."""
        self._step, now = step, time.monotonic()
        if now - self._shown < 0.2:
            return
        if not self._shown:
            self._started = now
            self._progress.start()
        self._shown = now
        left = self._eta.seconds_left(step)
        self._show(f"eta {_duration(left)}" if left is not None else "")

    def _show(self, left: str) -> None:
        times = f"{_duration(time.monotonic() - self._started)} {left}"
        self._progress.update(self._task, completed=self._step, times=times)

    def close(self) -> None:
        """Stops the bar."""
        if self._started:
            self._show("")
            self._progress.stop()
            self._started = 0.0


class QuietConsole:
    """No output; warnings are logged elsewhere."""

    def print(self, text: str) -> None:
        """Does nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def progress(self, step: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class GuardedConsole:
    """Replaces a console that raises by a quiet one, with a warning in the log file.

    A closed pipe must not stop the training.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def _call(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            if isinstance(error, OSError):
                silence(sys.stdout)
            self._console = QuietConsole()
            _log.warning("The console failed and is disabled: %r", error)

    def print(self, text: str) -> None:
        """Prints a text, with control characters as escapes."""
        self._call(self._console.print, visible(str(text)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of a step."""
        self._call(self._console.log, step, metrics)

    def progress(self, step: int) -> None:
        """Updates the progress; called after every step."""
        self._call(self._console.progress, step)

    def close(self) -> None:
        """Ends the output."""
        self._call(self._console.close)


def open_console(kind: str, unit: str, total_steps: int, start_step: int) -> GuardedConsole:
    """The console for ``track.console`` (``kind``)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # generated text can contain any character
    if kind == "auto":
        terminal = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        kind = "bar" if terminal else "plain"
    if kind == "bar":
        return GuardedConsole(BarConsole(unit, total_steps, start_step))
    return GuardedConsole(PlainConsole(unit, total_steps) if kind == "plain" else QuietConsole())


def format_metrics(metrics: Mapping[str, float], unit: str) -> str:
    """The most important metrics in one line."""
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
