"""Keeps a mirror in sync with the run directory's checkpoints, in a background thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from train.checkpoint.damage import DamagedError
from train.checkpoint.mirror import Mirror, MirrorError
from train.checkpoint.store import CheckpointStore
from train.exits import RetryError, RunError, UsageError

_log = logging.getLogger("train")
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0  # seconds before a retry


def mirror_unreadable(mirror: Mirror, store: CheckpointStore, error: MirrorError) -> RunError:
    """The error if the run has no local checkpoint and its mirror cannot be read."""
    kind = UsageError if error.is_misconfigured else RetryError
    remedy = "rerun when it can"
    if error.is_misconfigured:
        remedy = "correct its credentials and rights, or the kind of its files"
    return kind(
        f"There is no checkpoint in {store.directory}, and checkpoint.mirror.url, {mirror.url}, "
        f"cannot be read ({error}); {remedy}, or set checkpoint.mirror=null to start from the "
        "beginning."
    )


def restore_from_mirror(
    mirror: Mirror, store: CheckpointStore, check: Callable[[Path], object] = lambda _: None
) -> tuple[int | None, list[str]]:
    """Downloads the newest valid checkpoint into a run directory that has none. A checkpoint for
    which ``check`` raises DamagedError is not valid; another RunError of it ends the download, and
    nothing is installed.

    Returns its step (None if the mirror has none) and messages for the user. Raises RetryError, or
    UsageError for missing credentials or a file of the wrong kind, if the mirror cannot be read.
    """
    notes: list[str] = []
    try:
        for step in reversed(mirror.steps()):
            try:
                mirror.download(step, store, check)
            except DamagedError as error:
                store.remove_incomplete()
                notes.append(f"The mirror's checkpoint of step {step} is damaged ({error}).")
                continue
            except RunError:
                store.remove_incomplete()
                raise
            return step, [*notes, f"Restored the checkpoint of step {step} from {mirror.url}."]
    except MirrorError as error:
        raise mirror_unreadable(mirror, store, error) from error
    return None, notes


class Mirroring:
    """A thread that uploads checkpoints. It never blocks the training and never makes it fail."""

    def __init__(
        self,
        mirror: Mirror,
        store: CheckpointStore,
        run_id: str,
        warn: Callable[[str], None],
        ensure_in_place: Callable[[], None] = lambda: None,
    ) -> None:
        self._mirror, self._store, self._run_id, self._warn = mirror, store, run_id, warn
        self._ensure_in_place = ensure_in_place
        self._changed = threading.Condition()
        self._pending = True  # at first: uploads that an earlier attempt did not finish
        self._ending = self._abandoned = self._warned = False
        self._amended: set[int] = set()
        # A daemon thread, so that storage that hangs cannot block the process exit.
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def committed(self) -> None:
        """Wakes the thread; call it after each commit."""
        with self._changed:
            self._pending = True
            self._changed.notify()

    def amended(self, step: int) -> None:
        """Uploads what has changed in the checkpoint of a step; call it after each amendment."""
        self._amended.add(step)
        self.committed()

    def close(self, seconds: float, beat: Callable[[], None] = lambda: None) -> None:
        """Waits up to ``seconds`` for pending uploads, calling ``beat`` every second; warns if some
        remain."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        until = time.monotonic() + seconds
        try:
            while self._thread.is_alive() and (left := until - time.monotonic()) > 0:
                self._thread.join(min(left, 1.0))
                beat()
        finally:  # also after KeyboardInterrupt: another run may use this process next
            self._abandoned = True
        if self._thread.is_alive() or self._pending:
            self._warn(
                f"Not all checkpoints are in {self._mirror.url} yet; the next start of this run "
                "uploads the rest."
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
                self._synchronize()
                pause, self._warned = _FIRST_PAUSE, False
            except (MirrorError, DamagedError, OSError, RunError) as error:
                _log.warning("mirror: %s", error)
                if not self._warned and not self._abandoned:
                    self._warned = True
                    self._warn(
                        f"Checkpoints cannot be copied to {self._mirror.url} ({error}); training "
                        "continues, and the upload is retried."
                    )
                with self._changed:
                    self._pending = True
                    if self._ending:
                        return
                    self._changed.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _synchronize(self) -> None:
        """Uploads missing checkpoints, newest first, then removes copies of pruned ones."""
        self._ensure_in_place()  # else the checkpoints of another run may be there
        if (owner := self._mirror.owner()) not in (None, self._run_id):
            raise MirrorError(f"the run {owner} owns it now; set a separate URL for each run")
        self._mirror.claim(self._run_id)
        mirrored = self._mirror.steps()
        vanished: set[int] = set()
        while missing := [
            s
            for s in self._store.steps()
            if (s not in mirrored or s in self._amended) and s not in vanished
        ]:
            self._ensure_in_place()
            step = missing[-1]
            amended = step in self._amended
            self._amended.discard(step)  # before it is read: it may be amended again meanwhile
            try:
                with self._store.pinned(step):
                    self._mirror.upload(self._store, step, lambda: not self._abandoned)
                mirrored.append(step)
                _log.info("the checkpoint of step %d is in %s", step, self._mirror.url)
            except (FileNotFoundError, DamagedError) as error:
                if self._store.path(step).exists():
                    if not isinstance(error, DamagedError):
                        raise
                    self._warn(f"The checkpoint of step {step} is not copied: {error}.")
                vanished.add(step)  # damaged, or removed before it was pinned
            except MirrorError:
                if amended:
                    self._amended.add(step)
                raise
        local = self._store.steps()
        self._ensure_in_place()
        for step in mirrored:
            if step not in local and local and step < local[-1]:
                self._mirror.remove(step)
