"""The tracker, which passes metrics, reports and messages on to the sinks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from train.checkpoint.store import CheckpointStore
from train.secrets import redact
from train.track.background import Background
from train.track.console import open_console
from train.track.event_log import EVENTS, EventLog
from train.track.metrics_file import MetricsFile
from train.track.samples import SamplesSink
from train.track.sinks import RunInfo, Sink, make_sinks
from train.track.tensorboard import TensorBoardSink
from train.track.track_config import TrackConfig
from train.track.trainjob_sink import trainjob_sink
from train.track.wandb_nodes import NodeMetrics
from train.track.wandb_sink import WandbSink

_log = logging.getLogger("train")


class Tracker:
    """Logs metrics, reports and messages of a run. Ranks other than 0 write only their log file; a
    rank with ``node`` also sends the system metrics of its node.

    metrics.jsonl and the console are written directly. Each other sink is imported and called in a
    background thread of its own, so that it delays neither the start nor the loop nor other sinks;
    if it is too slow, reports and histograms are dropped first. No method raises because of a sink.
    """

    def __init__(
        self,
        config: TrackConfig,
        run: RunInfo,
        *,
        is_main: bool,
        sinks: Sequence[Sink] | None = None,
        store: CheckpointStore | None = None,
        node: NodeMetrics | None = None,
        close_seconds: float = 20.0,
    ) -> None:
        self._is_main, self._node = is_main, node
        if not is_main:
            return
        self._close_seconds = close_seconds
        self._closed = False
        self._warned: set[str] = set()
        self._step = run.start_step
        self._logged: int | None = None
        """A step of which the sinks got items that may not be the last ones."""
        self._evaluates = False
        """Whether the evaluation of this step is not logged yet."""
        self._console = open_console(config.console, run.unit, run.total_steps, run.start_step)
        if sinks is None:
            sinks = list[Sink]([SamplesSink(run)])
            if config.tensorboard:
                sinks.append(TensorBoardSink(run))
            if config.wandb != "disabled":
                sinks.append(WandbSink(run, config, store=store))
            sinks += make_sinks(config.sinks, run)
            if trainjob := trainjob_sink(run):
                sinks.append(trainjob)
        warn = partial(_log.warning, "%s")
        self._backgrounds = [Background(sink, self.info, warn) for sink in sinks]
        self._event_lock = threading.RLock()
        """Sinks get the events in the order of the file."""
        self._events = self._open_events(run)
        self._file = self._open_file(run)

    def _open_file(self, run: RunInfo) -> MetricsFile | None:
        path = run.directory / "metrics.jsonl"
        try:
            file = MetricsFile(path, start_step=run.start_step, attempt=run.attempt)
        except OSError as error:
            self.warn(f"{path} cannot be opened, so metrics are not written to it: {error}")
            return None
        if file.damaged:
            self.warn(
                f"{file.damaged} line(s) of {path} were damaged; moved them to {path.name}.damaged."
            )
        return file

    def _open_events(self, run: RunInfo) -> EventLog | None:
        path = run.directory / EVENTS
        try:
            return EventLog(path, run.attempt)
        except OSError as error:
            _log.warning("%s cannot be opened, so events are not written to it: %s", path, error)
            return None

    def _metrics(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except OSError as error:
            self._warn_once(
                "metrics.jsonl",
                f"metrics.jsonl cannot be written ({error}); rows are kept in memory until it can.",
            )
        else:
            self._warned.discard("metrics.jsonl")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the scalars of a step, such as "train/loss" or "eval/accuracy"."""
        if not self._is_main:
            return
        numbers = self._numbers(metrics)
        if self._file:
            self._metrics(self._file.log, step, numbers)
        self._console.log(step, numbers)
        _log.info("step %d %s", step, {name: round(v, 6) for name, v in numbers.items()})
        self._put("log", step, numbers)
        self._logged = step

    def _put(self, method: str, *arguments: Any, at: float | None = None) -> None:
        for background in self._backgrounds:
            background.put(method, *arguments, at=at)

    def _numbers(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        numbers = {}
        for name, value in metrics.items():
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError):
                self._warn_once(
                    name,
                    f"The metric {name!r} is {value!r}, which is not a number; it is not logged.",
                )
        return numbers

    def progress(self, step: int) -> None:
        """Updates the progress; called after every step."""
        if self._node:
            self._node.start(step)
        if not self._is_main:
            return
        self._step = step
        if self._file:
            self._metrics(self._file.advance, step)
        if self._logged is not None and self._logged < step:
            self._put("advance", step)
            self._logged = None
        self._console.progress(step)

    def begin_evaluation(self, step: int) -> None:
        """The evaluation of this step is logged next. If the attempt ends before, the step stays
        incomplete: the next attempt makes the evaluation, and then logs all of the step."""
        self._step, self._evaluates = step, True

    def end_evaluation(self) -> None:
        """The evaluation of the step was logged."""
        self._evaluates = False

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Logs texts (str) and images (float tensors or arrays of shape (3, H, W) in [0, 1])."""
        if not self._is_main or not items:
            return
        shown: dict[str, Any] = {}
        for name, item in items.items():
            if isinstance(item, str):
                shown[name] = _printable(item)
                self.info(f"{name} at step {step}:\n{shown[name]}")
            elif (image := _image(item)) is not None:
                shown[name] = image
            else:
                self._warn_once(
                    name,
                    f"The task's report {name!r} is neither text nor an image of shape (3, H, W); "
                    "it is not logged.",
                )
        self._put("report", step, shown)

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs histograms of arrays, by name. The caller must not change the arrays afterwards."""
        if self._is_main:
            self._put("histograms", step, dict(values))

    def info(self, text: str) -> None:
        """Writes a text to the console and the log file."""
        _log.info("%s", text)
        if self._is_main:
            self._console.print(text)

    def warn(self, text: str) -> None:
        """Writes a warning to the log file and, on rank 0, to standard error
        (``setup_logging``). The sinks get it as an event."""
        _log.warning("%s", text)
        self.event(text)

    def event(self, text: str) -> None:
        """Passes a sentence about what happened at this step to the sinks."""
        if not self._is_main:
            return
        text = redact(_printable(text))
        with self._event_lock:
            at = None
            try:
                if self._events:
                    at = self._events.append(self._step, text).seconds
            except (OSError, ValueError) as error:  # ValueError: it is closed
                _log.info("%s cannot be written: %s", EVENTS, error)
            self._put("event", self._step, text, at=at)

    def committed(self, step: int) -> None:
        """Tells the sinks that a checkpoint was committed or has changed. In any thread."""
        if self._is_main:
            self._put("checkpoint", step)

    def trace(self, step: int, path: Path) -> None:
        """Tells the sinks that a trace of torch.profiler that ends with this step was written. In
        any thread."""
        self.info(f"Trace of the steps up to {step}: {path}")
        if self._is_main:
            self._put("trace", step, path)

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            self.warn(text)

    def flush(self, step: int) -> None:
        """Makes metrics.jsonl durable up to ``step``; called before the commit of its
        checkpoint."""
        if self._is_main and self._file:
            self._metrics(self._file.flush, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Logs the final metrics."""
        if self._is_main:
            self._put("summary", dict(values))

    def wait_until_open(self) -> None:
        """Returns when the sinks are open and have printed their messages, or after some seconds:
        in a short run they would come after its last lines. ``close`` waits for them as well."""
        if not self._is_main:
            return
        until = time.monotonic() + min(5.0, self._close_seconds)
        for background in self._backgrounds:
            background.wait_until_open(max(0.0, until - time.monotonic()))

    def fail(self, code: int) -> None:
        """Reports to the sinks that an error ends the run; called before ``close``."""
        if self._is_main:
            for background in self._backgrounds:
                background.put_if_started("fail", code)
        self.end(code)

    def end(self, code: int) -> None:
        """Reports to the sinks the exit code of this attempt; called before ``close``."""
        if self._is_main:
            for background in self._backgrounds:
                background.put_if_started("end", code)

    def close(self) -> None:
        """Closes all sinks; waits for the slow ones up to ``close_seconds``."""
        if self._node:
            self._node.close()
        if not self._is_main or self._closed:
            return
        self._closed = True
        if self._file:
            self._metrics(self._file.close)
            self._file = None
        for background in self._backgrounds if self._evaluates else ():
            background.put_if_started("interrupted", self._step)
        until = time.monotonic() + self._close_seconds
        for background in self._backgrounds:
            background.begin_close()
        late = [b.sink.name for b in self._backgrounds if not b.close(until - time.monotonic())]
        if late:
            self.warn(
                f"Timed out after {self._close_seconds:g} s waiting for the tracking sinks "
                f"({', '.join(late)}); metrics.jsonl has all metrics."
            )
        if self._events:
            self._events.close()
        self._console.close()


_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {*b"\t\n"}, "\N{REPLACEMENT CHARACTER}")


def _printable(text: str) -> str:
    """The text with U+FFFD for control characters and invalid Unicode."""
    return text.replace("\r\n", "\n").encode("utf-8", "replace").decode().translate(_CONTROLS)


def _image(value: Any) -> Any:
    """An image as a uint8 array (3, H, W) on the host; None for anything else."""
    import numpy as np

    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    if (
        not isinstance(value, np.ndarray)
        or value.ndim != 3
        or value.shape[0] != 3
        or not value.size
    ):
        return None
    if value.dtype == np.uint8:
        return value
    return (np.nan_to_num(value).clip(0.0, 1.0) * 255.0).round().astype(np.uint8)
