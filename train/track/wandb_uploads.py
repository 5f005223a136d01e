"""A thread that sends checkpoints to W&B beside the training."""

from __future__ import annotations

import logging
import threading
from typing import Any

from train.exits import first_line
from train.track.wandb_checkpoints import CheckpointSender

_log = logging.getLogger("train")
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0  # seconds before a retry


class CheckpointUploads:
    """Never blocks the training and never makes it fail. One checkpoint at a time: the newest that
    W&B lacks. None waits in memory or in a copy; what is removed from the run directory before its
    turn is not sent."""

    def __init__(self, sender: CheckpointSender) -> None:
        self._sender = sender
        self._changed = threading.Condition()
        self._pending = True  # at first: what an earlier attempt did not send
        self._ending = self._abandoned = self._warned = False
        self.finished = False
        """Whether the run is complete, so that its newest checkpoint is the final one."""
        # A daemon thread, so that a server that hangs cannot block the process exit.
        self._thread = threading.Thread(target=self._work, name="wandb-artifacts", daemon=True)
        self._run: Any = None

    def start(self, wandb_run: Any) -> None:
        """Starts the thread, for an open W&B run."""
        self._run = wandb_run
        self._thread.start()

    def wake(self) -> None:
        """Looks for new checkpoints; called after each commit."""
        with self._changed:
            self._pending = True
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Waits up to ``seconds`` for what is missing. What has begun then may still end."""
        with self._changed:
            self._ending = self._pending = True
            self._changed.notify()
        self._thread.join(seconds)
        self._abandoned = self._thread.is_alive()

    def abandon(self, seconds: float = 0.0) -> None:
        """Gives up after ``seconds``; a warning says so if something was not sent."""
        self._thread.join(seconds)
        self._abandoned = True
        if (self._thread.is_alive() or self._pending) and not self._warned:
            self._warned = True
            _log.warning(
                "Not all checkpoints are in W&B yet; the next attempt of this run sends the rest, "
                "or `isorun sync`."
            )

    def _work(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            with self._changed:
                while not self._pending and not self._ending:
                    self._changed.wait()
                if not self._pending:
                    return
                self._pending = False
            try:
                self._send_missing()
                pause = _FIRST_PAUSE
                if self._abandoned:
                    self._pending = bool(self._sender.missing(ended=self.finished))
                    return
            except BaseException as error:  # wandb raises KeyboardInterrupt and SystemExit as well
                self._report(error)
                with self._changed:
                    self._pending = True
                    if self._ending:
                        return
                    self._changed.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _send_missing(self) -> None:
        failed = None
        if self._sender.lacks_dataset:
            try:
                self._sender.send_dataset(self._run)
            except Exception as error:  # the checkpoints do not depend on it
                failed = error
        while not self._abandoned and (steps := self._sender.missing(ended=self.finished)):
            self._sender.send(self._run, steps[0])
            self._sender.update_aliases(self._run)
        if not self._abandoned:
            self._sender.update_aliases(self._run)
        if failed:
            raise failed

    def _report(self, error: BaseException) -> None:
        _log.info("sending checkpoints to W&B failed", exc_info=True)
        if not self._warned and not self._abandoned:
            self._warned = True
            _log.warning(
                "Checkpoints cannot be sent to W&B (%s); training continues. What is missing is "
                "sent later in this run, by its next attempt or by `isorun sync`.",
                first_line(error),
            )
