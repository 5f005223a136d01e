"""A thread that calls the slow sinks, and its bounded queue."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from train.track.sinks import Sink

_log = logging.getLogger("train")

_ITEMS = 1000
_BYTES = 256 * 2**20
"""Limit on the histograms and images in the queue; a single larger item is still accepted."""
_BULKY = ("histograms", "report")

# A process that is forked (a data worker) while another thread imports a module inherits a locked
# import lock and deadlocks when it imports that module. So a fork waits for imports.
_importing = threading.RLock()
os.register_at_fork(
    before=_importing.acquire,
    after_in_parent=_importing.release,
    after_in_child=_importing.release,
)


class _Item(NamedTuple):
    """A call that waits in the queue."""

    method: str
    arguments: tuple[Any, ...]
    size: int
    """Bytes of histograms and images."""
    time: float
    """When it was put into the queue, in seconds since the epoch."""


class Background:
    """Calls the sinks' methods in one daemon thread, in order.

    A sink that raises is dropped with a warning. If the queue is full, histograms and reports are
    dropped first. The thread starts with the first item, so that the sinks' imports do not delay
    the start of the run.
    """

    def __init__(
        self, sinks: Sequence[Sink], info: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self._sinks, self._info, self._warn = list(sinks), info, warn
        self._queue: deque[_Item] = deque()
        self._bytes = 0
        self._ready = threading.Condition()
        self._closing = False
        self._opened = threading.Event()
        self._dropped: Counter[str] = Counter()
        # A daemon thread, so that a sink that hangs cannot block the process exit.
        work = self._work
        if "torch" in sys.modules:  # else nothing uses a GPU
            from train.distributed.gpu import with_current_gpu

            work = with_current_gpu(work)
        self._thread = threading.Thread(target=work, name="tracker", daemon=True)
        self._started = False

    def put(self, method: str, *arguments: Any) -> None:
        """Queues a call of this method of every sink; does not block."""
        if not self._sinks:
            return
        size = _size(arguments[-1]) if method in _BULKY else 0
        with self._ready:
            first = not self._dropped
            while self._bytes and size and self._bytes + size > _BYTES:
                self._drop()
            if len(self._queue) >= _ITEMS:
                self._drop()
            self._queue.append(_Item(method, arguments, size, time.time()))
            self._bytes += size
            self._ready.notify()
            first = first and bool(self._dropped)
            # Events of the start wait: the imports would delay it.
            if not self._started and method != "event":
                self._started = True
                self._thread.start()
        if first:
            self._warn("The tracking sinks are too slow; some of their items are dropped.")

    def wait_until_open(self, seconds: float) -> None:
        """Returns when all sinks are open, at the latest after ``seconds``."""
        if self._started:
            self._opened.wait(seconds)

    def fail(self, code: int) -> None:
        """Queues the call of ``fail`` of every sink that was opened."""
        if self._started:
            self.put("fail", code)

    def put_if_started(self, method: str, *arguments: Any) -> None:
        """Queues a call as ``put`` does, unless the thread has not started: then the sinks got
        nothing, and need not be opened."""
        if self._started:
            self.put(method, *arguments)

    def _drop(self) -> None:
        """Drops the oldest histograms or report; without one, the oldest item."""
        bulky = (number for number, item in enumerate(self._queue) if item.method in _BULKY)
        number = next(bulky, 0)
        item = self._queue[number]
        del self._queue[number]
        self._bytes -= item.size
        self._dropped[item.method] += 1

    def close(self, seconds: float) -> bool:
        """Waits up to ``seconds`` for the queue to empty; returns False on a timeout."""
        if not self._started or self._closing:
            return True
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join(seconds)
        if self._dropped:
            counts = ", ".join(f"{count} x {what}" for what, count in self._dropped.items())
            self._warn(f"The tracking sinks were too slow; {counts} dropped.")
        late = self._thread.is_alive()
        for sink in list(self._sinks) if late else []:
            self._abandon(sink)
        return not late

    def _work(self) -> None:
        for sink in list(self._sinks):
            with _importing:
                self._call(sink, "load")
            if sink in self._sinks and (message := self._call(sink, "open")):
                self._info(message)
        self._opened.set()
        while True:
            with self._ready:
                while not self._queue and not self._closing:
                    self._ready.wait()
                if not self._queue:
                    break
                method, arguments, size, logged_at = self._queue.popleft()
                self._bytes -= size
            if method == "histograms":
                step, values = arguments
                arguments = (step, _finite(values))
            for sink in list(self._sinks):
                # A copy each: what one sink does to it must not reach the others.
                own = (dict(item) if isinstance(item, dict) else item for item in arguments)
                sink.logged_at = logged_at
                self._call(sink, method, *own)
        for sink in list(self._sinks):
            self._call(sink, "close")

    def _call(self, sink: Sink, method: str, *arguments: Any) -> Any:
        try:
            return getattr(sink, method)(*arguments)
        except BaseException as error:  # wandb raises KeyboardInterrupt and SystemExit as well
            _log.info("%s failed", sink.name, exc_info=True)
            self._sinks.remove(sink)
            self._abandon(sink)
            self._warn(f"{sink.name} failed and is disabled: {error!r}")
            return None

    def _abandon(self, sink: Sink) -> None:
        try:
            sink.abandon()
        except Exception:
            _log.info("abandon() of %s failed", sink.name, exc_info=True)


def _size(items: Mapping[str, Any]) -> int:
    return sum(len(v) if isinstance(v, str) else v.nbytes for v in items.values())


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The finite numbers of each array, without empty arrays; a histogram cannot hold others."""
    import numpy as np

    finite = {name: value[np.isfinite(value)] for name, value in values.items()}
    return {name: value for name, value in finite.items() if value.size}
