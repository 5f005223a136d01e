"""Keeps a mirror like the checkpoints of the run directory, beside the training."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from train.checkpoint.mirror import Mirror, MirrorError
from train.checkpoint.store import CheckpointStore, DamagedError
from train.exits import RetryError, RunError, UsageError

_log = logging.getLogger("train")
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0  # seconds before it is tried again


def mirror_unreadable(mirror: Mirror, store: CheckpointStore, error: MirrorError) -> RunError:
    """What is raised where there is nothing to go on from but a mirror that cannot be read."""
    kind = UsageError if error.is_misconfigured else RetryError
    remedy = (
        "see to its credentials and rights" if error.is_misconfigured else "start again when it can"
    )
    return kind(
        f"There is no checkpoint in {store.directory}, and checkpoint.mirror.url, {mirror.url}, "
        f"cannot be read ({error}); {remedy}, or set checkpoint.mirror=null to begin anew."
    )


def restore_from_mirror(mirror: Mirror, store: CheckpointStore) -> tuple[int | None, list[str]]:
    """Fetches the newest whole checkpoint into a run directory that has none: its step, and what
    there is to tell.

    Raises RetryError where the mirror cannot be reached: to begin anew would lose what is there.
    """
    notes: list[str] = []
    try:
        for step in reversed(mirror.steps()):
            try:
                mirror.download(step, store)
            except DamagedError as error:
                store.remove_incomplete()
                notes.append(f"The mirror's checkpoint of step {step} is damaged ({error}).")
                continue
            return step, [*notes, f"The checkpoint of step {step} came from {mirror.url}."]
    except MirrorError as error:
        raise mirror_unreadable(mirror, store, error) from error
    return None, notes


class Mirroring:
    """Sends checkpoints from a thread of its own; training never waits for it, nor fails by it."""

    def __init__(
        self, mirror: Mirror, store: CheckpointStore, run_id: str, warn: Callable[[str], None]
    ) -> None:
        self._mirror, self._store, self._run_id, self._warn = mirror, store, run_id, warn
        self._changed = threading.Condition()
        self._news = True  # at first, what an earlier attempt has left to be sent
        self._ending = self._abandoned = self._warned = False
        # A daemon: storage that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def committed(self) -> None:
        """There is a new checkpoint."""
        with self._changed:
            self._news = True
            self._changed.notify()

    def close(self, seconds: float, beat: Callable[[], None] = lambda: None) -> None:
        """Waits until all is sent, but no longer than that, and ``beat``s meanwhile; warns of
        what is not."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        until = time.monotonic() + seconds
        while self._thread.is_alive() and (left := until - time.monotonic()) > 0:
            self._thread.join(min(left, 1.0))
            beat()
        self._abandoned = True
        if self._thread.is_alive() or self._news:
            self._warn(
                f"Not all checkpoints are in {self._mirror.url} yet; the next start of this run "
                "sends the rest."
            )

    def _work(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            with self._changed:
                while not self._news and not self._ending:
                    self._changed.wait()
                if not self._news:
                    return
                self._news = False
            try:
                self._synchronize()
                pause, self._warned = _FIRST_PAUSE, False
            except (MirrorError, DamagedError, OSError) as error:
                _log.warning("mirror: %s", error)
                if not self._warned and not self._abandoned:
                    self._warned = True
                    self._warn(
                        f"Checkpoints cannot be copied to {self._mirror.url} ({error}); training "
                        "goes on, and it is tried again."
                    )
                with self._changed:
                    self._news = True
                    if self._ending:
                        return
                    self._changed.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _synchronize(self) -> None:
        """Sends what is missing, the newest first, and removes what is here no more."""
        if (owner := self._mirror.owner()) not in (None, self._run_id):
            raise MirrorError(f"the run {owner} has it now; give each run an address of its own")
        self._mirror.claim(self._run_id)
        there = self._mirror.steps()
        refused: set[int] = set()
        while missing := [s for s in self._store.steps() if s not in there and s not in refused]:
            step = missing[-1]
            self._store.pinned.add(step)
            try:
                self._mirror.upload(self._store, step, lambda: not self._abandoned)
                there.append(step)
                _log.info("the checkpoint of step %d is in %s", step, self._mirror.url)
            except (FileNotFoundError, DamagedError):
                if self._store.path(step).exists():
                    raise
                refused.add(step)  # removed before it was pinned
            finally:
                self._store.pinned.discard(step)
        here = self._store.steps()
        for step in there:
            if step not in here and here and step < here[-1]:
                self._mirror.remove(step)
