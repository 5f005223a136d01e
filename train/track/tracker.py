"""One tracker, several sinks. Whatever a sink does, the training neither stops nor waits."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.track.config import TrackConfig
from train.track.console import make_console
from train.track.metrics_file import MetricsFile
from train.track.sinks import RunInfo, Sink, TensorBoardSink, WandbSink

_log = logging.getLogger("train")
_QUEUE = 1000


class Tracker:
    """Takes in all that a run has to tell. On ranks other than 0 only log files are written.

    metrics.jsonl and the console are written at once; all other sinks live in one background
    thread, which also imports them, so that neither the start nor the loop waits for them. Where
    they cannot keep up, reports and histograms are dropped first.
    """

    def __init__(
        self,
        config: TrackConfig,
        run: RunInfo,
        *,
        is_main: bool,
        sinks: Sequence[Sink] | None = None,
        close_seconds: float = 20.0,
    ) -> None:
        self._is_main = is_main
        if not is_main:
            return
        self._close_seconds = close_seconds
        self._console = make_console(config.console, run.unit, run.total_steps, run.start_step)
        self._file: MetricsFile | None = None
        self._file_failed = False
        self._guard("metrics.jsonl", self._open_file, run)
        if sinks is None:
            sinks = []
            if config.tensorboard:
                sinks.append(TensorBoardSink(run))
            if config.wandb != "disabled":
                sinks.append(WandbSink(run, config))
        self._background = _Background(sinks, self.say, self.warn)

    def _open_file(self, run: RunInfo) -> None:
        path = run.directory / "metrics.jsonl"
        self._file = MetricsFile(path, start_step=run.start_step, attempt=run.attempt)
        if self._file.damaged:
            self.warn(
                f"{self._file.damaged} line(s) of {path} were no metrics; they are now in "
                f"{path.name}.damaged."
            )

    def _guard(self, name: str, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            _log.exception("%s failed", name)
            self.warn(f"{name} failed and is not written any more: {error}")
            self._file = None

    def _metrics(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except OSError as error:
            if not self._file_failed:
                self.warn(f"metrics.jsonl cannot be written ({error}); its rows wait until it can.")
            self._file_failed = True
        else:
            self._file_failed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of a step, such as "train/loss" or "eval/accuracy"."""
        if not self._is_main:
            return
        metrics = dict(metrics)
        if self._file:
            self._metrics(self._file.log, step, metrics)
        self._console.log(step, metrics)
        _log.info("step %d %s", step, {name: round(v, 6) for name, v in metrics.items()})
        self._background.put("log", step, metrics)

    def progress(self, step: int) -> None:
        """After every step; costs microseconds."""
        if not self._is_main:
            return
        if self._file:
            self._metrics(self._file.passed, step)
        self._console.progress(step)

    def report(self, step: int, items: Mapping[str, Any]) -> None:
        """Texts (str) and images (float tensor or array of shape (3, H, W) in [0, 1])."""
        if not self._is_main or not items:
            return
        items = {k: v if isinstance(v, str) else _array(v) for k, v in items.items()}
        for name, item in items.items():
            if isinstance(item, str):
                self.say(f"{name} at step {step}:\n{item}")
        self._background.put("report", step, items)

    def histograms(self, step: int, values: Mapping[str, Any]) -> None:
        """Arrays whose distribution is of interest; the caller gives them away."""
        if self._is_main:
            self._background.put("histograms", step, dict(values))

    def say(self, text: str) -> None:
        """Text for the person at the console, and for the log file."""
        _log.info("%s", text)
        if self._is_main:
            self._console.say(text)

    def warn(self, text: str) -> None:
        """A warning for the person and for the log file."""
        _log.warning("%s", text)
        if self._is_main:
            self._console.warn(text)

    def flush(self, step: int) -> None:
        """Makes metrics.jsonl durable up to ``step``; called before its checkpoint is committed."""
        if self._is_main and self._file:
            self._metrics(self._file.flush, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """The final numbers."""
        if self._is_main:
            self._background.put("summary", dict(values))

    def close(self) -> None:
        """Waits for the sinks, but not for ever."""
        if not self._is_main:
            return
        if self._file:
            self._metrics(self._file.close)
        if not self._background.close(self._close_seconds):
            self.warn(
                f"A sink was not done after {self._close_seconds:g} s and was left behind; "
                "metrics.jsonl has everything."
            )
        self._console.close()


class _Background:
    """The thread that feeds the sinks, and the queue before it."""

    def __init__(
        self, sinks: Sequence[Sink], say: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self._sinks, self._say, self._warn = list(sinks), say, warn
        self._queue: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._ready = threading.Condition()
        self._closing = False
        self._dropped = 0
        # A daemon: a sink that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._started = False

    def put(self, method: str, *arguments: Any) -> None:
        """Queues a call of every sink's method; never waits."""
        if not self._sinks:
            return
        with self._ready:
            if len(self._queue) >= _QUEUE:
                self._dropped += 1
                victim = next((i for i in self._queue if i[0] in ("histograms", "report")), None)
                self._queue.remove(victim) if victim else self._queue.popleft()
            self._queue.append((method, arguments))
            self._ready.notify()
        if not self._started:
            self._started = True
            self._thread.start()

    def close(self, seconds: float) -> bool:
        """Lets the thread finish; False where that took too long."""
        if not self._started:
            return True
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join(seconds)
        if self._dropped:
            self._warn(f"The sinks could not keep up: {self._dropped} item(s) were dropped.")
        return not self._thread.is_alive()

    def _work(self) -> None:
        for sink in list(self._sinks):
            said = self._call(sink, "open")
            if said:
                self._say(said)
        while True:
            with self._ready:
                while not self._queue and not self._closing:
                    self._ready.wait()
                if not self._queue:
                    break
                method, arguments = self._queue.popleft()
            for sink in list(self._sinks):
                self._call(sink, method, *arguments)
        for sink in list(self._sinks):
            self._call(sink, "close")

    def _call(self, sink: Sink, method: str, *arguments: Any) -> Any:
        try:
            return getattr(sink, method)(*arguments)
        except BaseException as error:  # wandb raises KeyboardInterrupt and SystemExit as well
            _log.exception("%s failed", sink.name)
            if sink in self._sinks:
                self._sinks.remove(sink)
            self._warn(f"{sink.name} failed and is not written any more: {error!r}")
            return None


def _array(value: Any) -> Any:
    """A tensor as a numpy array on the host; anything else as it is."""
    return value.detach().float().cpu().numpy() if hasattr(value, "detach") else value
