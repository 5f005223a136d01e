"""A thread that calls a slow sink, and its bounded queue."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from train.exits import repr_of
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
    """Calls a sink's methods in a daemon thread of its own, in order, so that a sink that is slow
    or hangs delays no other.

    If the sink raises, it is dropped with a warning. If the queue is full, histograms and reports
    are dropped first. The thread starts with the first item, so that the sink's imports do not
    delay the start of the run.
    """

    def __init__(
        self, sink: Sink, info: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self.sink, self._info, self._warn = sink, info, warn
        self._failed = False
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
        self._thread = threading.Thread(target=work, name=f"tracker {sink.name}", daemon=True)
        self._started = False

    def put(self, method: str, *arguments: Any, at: float | None = None) -> None:
        """Queues a call of this method of the sink; does not block. ``at``: when the item was
        logged, in seconds since the epoch; by default now."""
        if self._failed:
            return
        with self._ready:
            first = not self._dropped
            if self._has(method):
                at = time.time() if at is None else at
                self._append(_Item(method, arguments, _size(method, arguments), at))
            first = first and bool(self._dropped)
            # Events of the start wait: the imports would delay it.
            if not self._started and method != "event":
                self._started = True
                self._thread.start()
        if first:
            self._warn(
                f"The tracking sinks are too slow: {self.sink.name} loses some of its items."
            )

    def _has(self, method: str) -> bool:
        """Whether the sink has a method of its own, not the empty default."""
        found = getattr(self.sink, method)
        return getattr(found, "__func__", None) is not getattr(Sink, method)

    def _append(self, item: _Item) -> None:
        while self._bytes and item.size and self._bytes + item.size > _BYTES:
            self._drop()
        if len(self._queue) >= _ITEMS:
            self._drop()
        self._queue.append(item)
        self._bytes += item.size
        self._ready.notify()

    def wait_until_open(self, seconds: float) -> None:
        """Returns when the sink is open, at the latest after ``seconds``."""
        if self._started:
            self._opened.wait(seconds)

    def put_if_started(self, method: str, *arguments: Any) -> None:
        """Queues a call as ``put`` does, unless the thread has not started: then the sink got
        nothing, and needs not be opened."""
        if self._started:
            self.put(method, *arguments)

    def _drop(self) -> None:
        """Drops the oldest histograms or report; without one, the oldest item that is not an event:
        of those there are few, and no later item has what they tell."""
        bulky = (number for number, item in enumerate(self._queue) if item.method in _BULKY)
        others = (number for number, item in enumerate(self._queue) if item.method != "event")
        number = next(bulky, next(others, 0))
        item = self._queue[number]
        del self._queue[number]
        self._bytes -= item.size
        self._dropped[item.method] += 1

    def begin_close(self) -> None:
        """Lets the thread close the sink after its last item."""
        with self._ready:
            self._closing = True
            self._ready.notify()

    def close(self, seconds: float) -> bool:
        """Waits up to ``seconds`` for the sink to close; returns False on a timeout."""
        if not self._started:
            return True
        self.begin_close()
        self._thread.join(max(0.0, seconds))
        if self._dropped:
            counts = ", ".join(f"{count} x {what}" for what, count in self._dropped.items())
            self._warn(f"{self.sink.name} was too slow; {counts} dropped.")
        late = self._thread.is_alive()
        if late and not self._failed:
            self._abandon()
        return not late

    def _work(self) -> None:
        with _importing:
            self._call("load")
        if message := self._call("open"):
            self._info(message)
        self._opened.set()
        while not self._failed:
            with self._ready:
                while not self._queue and not self._closing:
                    self._ready.wait()
                if not self._queue:
                    break
                method, arguments, size, self.sink.logged_at = self._queue.popleft()
                self._bytes -= size
            if method == "histograms":
                step, values = arguments
                arguments = (step, _finite(values))
            # Copies: what one sink does to them must not reach the others.
            own = (dict(item) if isinstance(item, dict) else item for item in arguments)
            self._call(method, *own)
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._failed:
            return None
        try:
            return getattr(self.sink, method)(*arguments)
        except BaseException as error:  # wandb raises KeyboardInterrupt and SystemExit as well
            self._failed = True
            _log.info("%s failed", self.sink.name, exc_info=True)
            self._abandon()
            self._warn(f"{self.sink.name} failed and is disabled: {repr_of(error)}")
            return None

    def _abandon(self) -> None:
        try:
            self.sink.abandon()
        except BaseException:
            _log.info("abandon() of %s failed", self.sink.name, exc_info=True)


def _size(method: str, arguments: tuple[Any, ...]) -> int:
    items: Mapping[str, Any] = arguments[-1] if method in _BULKY else {}
    return sum(len(v) if isinstance(v, str) else v.nbytes for v in items.values())


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The finite numbers of each array, without empty arrays; a histogram cannot hold others."""
    import numpy as np

    finite = {name: value[np.isfinite(value)] for name, value in values.items()}
    return {name: value for name, value in finite.items() if value.size}
