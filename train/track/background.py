"""The thread that feeds the slow sinks, and the bounded queue before it."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.track.sinks import Sink

_log = logging.getLogger("train")

_ITEMS = 1000
_BYTES = 256 * 2**20
"""Of histograms and images that wait; the newest may be larger than that."""
_BULKY = ("histograms", "report")

# A process forked (for data workers) while another thread imports gets a copy of the import's
# lock that nobody will ever release, and hangs when it imports the same module. So forks wait.
_importing = threading.RLock()
os.register_at_fork(
    before=_importing.acquire,
    after_in_parent=_importing.release,
    after_in_child=_importing.release,
)


class Background:
    """Calls the sinks' methods in one daemon thread, in order. A sink that raises is dropped,
    with a warning; where the sinks cannot keep up, histograms and reports are dropped first.

    The thread starts with the first item, so that what the sinks import costs the start nothing.
    """

    def __init__(
        self, sinks: Sequence[Sink], say: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self._sinks, self._say, self._warn = list(sinks), say, warn
        self._queue: deque[tuple[str, tuple[Any, ...], int]] = deque()
        self._bytes = 0
        self._ready = threading.Condition()
        self._closing = False
        self._dropped: Counter[str] = Counter()
        # A daemon: a sink that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._started = False

    def put(self, method: str, *arguments: Any) -> None:
        """Queues a call of every sink's method; never waits."""
        if not self._sinks:
            return
        size = _size(arguments[-1]) if method in _BULKY else 0
        with self._ready:
            first = not self._dropped
            while self._bytes and size and self._bytes + size > _BYTES:
                self._drop()
            if len(self._queue) >= _ITEMS:
                self._drop()
            self._queue.append((method, arguments, size))
            self._bytes += size
            self._ready.notify()
            first = first and bool(self._dropped)
            if not self._started:
                self._started = True
                self._thread.start()
        if first:
            self._warn("TensorBoard or W&B cannot keep up; some of their items will be missing.")

    def _drop(self) -> None:
        """Removes the oldest bulky item, or, where there is none, the oldest of all."""
        bulky = (number for number, item in enumerate(self._queue) if item[0] in _BULKY)
        number = next(bulky, 0)
        method, _, size = self._queue[number]
        del self._queue[number]
        self._bytes -= size
        self._dropped[method] += 1

    def close(self, seconds: float) -> bool:
        """Lets the thread finish; False where that took too long."""
        if not self._started or self._closing:
            return True
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join(seconds)
        if self._dropped:
            counts = ", ".join(f"{count} x {what}" for what, count in self._dropped.items())
            self._warn(f"TensorBoard and W&B could not keep up; they lack {counts}.")
        late = self._thread.is_alive()
        for sink in list(self._sinks) if late else []:
            self._abandon(sink)
        return not late

    def _work(self) -> None:
        for sink in list(self._sinks):
            with _importing:
                self._call(sink, "load")
            if sink in self._sinks and (said := self._call(sink, "open")):
                self._say(said)
        while True:
            with self._ready:
                while not self._queue and not self._closing:
                    self._ready.wait()
                if not self._queue:
                    break
                method, arguments, size = self._queue.popleft()
                self._bytes -= size
            if method == "histograms":
                step, values = arguments
                arguments = (step, _finite(values))
            for sink in list(self._sinks):
                self._call(sink, method, *arguments)
        for sink in list(self._sinks):
            self._call(sink, "close")

    def _call(self, sink: Sink, method: str, *arguments: Any) -> Any:
        try:
            return getattr(sink, method)(*arguments)
        except BaseException as error:  # wandb raises KeyboardInterrupt and SystemExit as well
            _log.info("%s failed", sink.name, exc_info=True)
            self._sinks.remove(sink)
            self._abandon(sink)
            self._warn(f"{sink.name} failed and is not written any more: {error!r}")
            return None

    def _abandon(self, sink: Sink) -> None:
        try:
            sink.abandon()
        except Exception:
            _log.info("%s could not be abandoned", sink.name, exc_info=True)


def _size(items: Mapping[str, Any]) -> int:
    return sum(len(v) if isinstance(v, str) else v.nbytes for v in items.values())


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Only what can be drawn: a histogram has no place for NaN and infinity."""
    import numpy as np

    drawn = {name: value[np.isfinite(value)] for name, value in values.items()}
    return {name: value for name, value in drawn.items() if value.size}
