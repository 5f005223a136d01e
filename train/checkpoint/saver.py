"""Saves checkpoints in a background thread; training stalls only for a copy of its state."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from train.checkpoint import dcp
from train.checkpoint.checkpoint_config import CheckpointConfig
from train.checkpoint.damage import DamagedError
from train.checkpoint.index import INDEX, PICKLED_INDEX
from train.checkpoint.manifest import Manifest, hash_file
from train.checkpoint.store import CheckpointStore
from train.distributed.collectives import Collectives
from train.distributed.gpu import with_current_gpu
from train.distributed.shard import Shard
from train.exits import RetryError
from train.process.diagnose import is_lost_peer

T = TypeVar("T")
_log = logging.getLogger("train")


@dataclass(frozen=True)
class SaveRequest:
    """One checkpoint to save."""

    step: int
    state: dict[str, Any]
    """State of the loop, as JSON values."""
    metrics: dict[str, float] | None
    """Evaluation at this step, if there was one."""
    before_commit: Callable[[], None]
    """Called on every rank, in the writing thread, after all files are written and before the
    commit. May be collective over the saver's group."""


@dataclass
class SaveTiming:
    """Seconds that one checkpoint took."""

    copy: float = 0.0
    """Stall of the training for the copy."""
    wait: float = 0.0
    """Stall of the training until it was written."""
    write: float = 0.0
    """Writing, hashing and committing; in the background if asynchronous."""


@dataclass
class _Job:
    request: SaveRequest
    timing: SaveTiming
    error: str | None = "it did not finish"
    """Why it failed; None once it is committed."""
    claim: threading.Lock = field(default_factory=threading.Lock)
    """Taken by the writing thread when it begins."""
    done: threading.Event = field(default_factory=threading.Event)
    """Set when nothing is written any more. Unlike ``Thread.join``, a wait for it can be repeated
    after KeyboardInterrupt."""


class CheckpointSaver:
    """Saves at most one checkpoint at a time. ``save`` and ``wait`` are collective.

    The copy uses host buffers that are kept from save to save (pinned for CUDA), because the first
    write to new memory takes longer than the copy.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        collectives: Collectives,
        *,
        last_step: int | None = None,
        on_commit: Callable[[], None] | None = None,
        ensure_in_place: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self.config = store, config
        self.rank, self.group = collectives.rank, collectives.host_group
        self._collectives, self._on_commit = collectives, on_commit
        self._ensure_in_place = ensure_in_place
        self.last_step = last_step
        """The step of the newest committed checkpoint."""
        self.last_timing = SaveTiming()
        self.may_retry = True
        """Whether the last failure was one of the storage or of another rank, not of the code."""
        self._buffers: dict[str, Tensor] = {}
        self._reserving: threading.Thread | None = None
        self._job: _Job | None = None

    def save(self, shards: Mapping[str, Shard], request: SaveRequest) -> str | None:
        """Waits for the previous checkpoint, copies the shards and starts to write them.

        The tensors may change after it returns. Returns why the previous checkpoint failed (with
        ``asynchronous`` false, also why this one failed), else None.
        """
        error = self.wait()
        started = time.perf_counter()
        copies = self._copy(shards)
        job = _Job(request, SaveTiming(copy=time.perf_counter() - started))
        # Not a daemon thread: the process finishes the write even if it ends by an exception.
        thread = threading.Thread(
            target=with_current_gpu(self._run), args=(job, copies), name="checkpoint"
        )
        self._job = job
        try:
            thread.start()
        except BaseException:  # also KeyboardInterrupt, before or after the thread has begun
            if job.claim.acquire(blocking=False):  # it has not, and now never will
                job.done.set()
            raise
        if not self.config.asynchronous:
            error = self.wait() or error
        return error

    def wait(self) -> str | None:
        """Waits for the checkpoint in flight; returns why it failed, else None. Equal on all
        ranks."""
        job = self._job
        if job is None:
            return None
        started = time.perf_counter()
        job.done.wait()  # KeyboardInterrupt, if raised, leaves the job in flight
        job.timing.wait = time.perf_counter() - started
        self._job = None
        if job.error is None:
            self.last_step, self.last_timing = job.request.step, job.timing
        return job.error

    def close(self) -> None:
        """Waits for the checkpoint in flight. Raises KeyboardInterrupt only after the wait: what
        the writing thread uses, such as the ledger, is closed next."""
        interrupt: KeyboardInterrupt | None = None
        while self._job is not None:
            try:
                self.wait()
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    @property
    def failed(self) -> bool:
        """Whether the last write has failed and ``wait`` has not reported it. Ranks may briefly
        differ."""
        return self._job is not None and not self.in_flight and self._job.error is not None

    @property
    def written(self) -> bool:
        """Whether the one in flight is committed; ranks come to know it within moments."""
        return self._job is not None and not self.in_flight and self._job.error is None

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint is being written. Ranks may briefly differ."""
        return self._job is not None and not self._job.done.is_set()

    def reserve(self, shards: Mapping[str, Shard]) -> None:
        """Allocates the host buffers for these shards in a background thread, so that the first
        save stalls no longer than later ones."""
        if self.config.asynchronous:
            self._reserving = threading.Thread(
                target=with_current_gpu(self._allocate),
                args=(dict(shards),),
                name="reserve",
                daemon=True,
            )
            self._reserving.start()

    def _allocate(self, shards: Mapping[str, Shard]) -> None:
        on_gpu = _on_gpu(shards)
        for name, shard in shards.items():
            buffer, like = self._buffers.get(name), shard.local
            if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
                buffer = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=on_gpu)
                self._buffers[name] = buffer.zero_()  # the first write maps the pages

    def _copy(self, shards: Mapping[str, Shard]) -> dict[str, Shard]:
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        self._allocate(shards)
        self._buffers = {name: self._buffers[name] for name in shards}
        with torch.no_grad():
            for name, shard in shards.items():
                self._buffers[name].copy_(shard.local, non_blocking=True)
        if _on_gpu(shards):
            torch.cuda.synchronize()
        return {name: shard.with_local(self._buffers[name]) for name, shard in shards.items()}

    def _run(self, job: _Job, copies: dict[str, Shard]) -> None:
        """The writing thread."""
        if job.claim.acquire(blocking=False):
            try:
                self._write(job, copies)
            finally:
                job.done.set()

    def _write(self, job: _Job, copies: dict[str, Shard]) -> None:
        started = time.perf_counter()
        request = job.request
        try:
            made = self._phase(lambda: self.store.begin(request.step) if self.rank == 0 else None)
            temporary = Path(self._gather(str(made))[0])
            self._phase(temporary.stat)  # DCP would create it, in a moved run as well
            self._phase(lambda: dcp.save(copies, temporary, self.group))
            self._phase(request.before_commit)
            mine = self._phase(lambda: self._hash_own(temporary))
            files = {name: entry for part in self._gather(mine) for name, entry in part.items()}
            manifest = Manifest(request.step, request.state, request.metrics, files)
            self._phase(lambda: self._commit(temporary, manifest) if self.rank == 0 else None)
            job.error = None
        except _FailedError as error:
            job.error, self.may_retry = str(error), error.may_retry
        except BaseException as error:  # in an exchange between the ranks
            job.error, self.may_retry = _reason(error)[0], True
        job.timing.write = time.perf_counter() - started

    def _phase(self, work: Callable[[], T]) -> T:
        """Runs one part of the save; if it fails on any rank, raises _FailedError on all ranks, so
        that no rank blocks in the next collective."""
        error = result = None
        try:
            result = work()
        except BaseException as caught:
            error = _reason(caught)
        errors = self._gather(error)
        failed = [(rank, *found) for rank, found in enumerate(errors) if found is not None]
        if failed:
            if self.rank == 0:
                with suppress(OSError, RetryError):  # the next start removes it as well
                    self._ensure_in_place()
                    self.store.remove_incomplete()
            rank, reason, may_retry = failed[0]
            text = reason if len(errors) == 1 else f"rank {rank}: {reason}"
            raise _FailedError(text, may_retry=may_retry)
        return result  # type: ignore[return-value]

    def _gather(self, value: Any) -> list[Any]:
        """The value of each rank, ordered by rank."""
        return self._collectives.all_gather_object(value)

    def _hash_own(self, directory: Path) -> dict[str, Any]:
        """Size and SHA-256 of the files that this rank wrote; rank 0 also wrote the index."""
        return {
            path.name: hash_file(path)
            for path in sorted(directory.iterdir())
            if path.name.startswith(f"__{self.rank}_")
            or (self.rank == 0 and path.name in (INDEX, PICKLED_INDEX))
        }

    def _commit(self, temporary: Path, manifest: Manifest) -> None:
        self._ensure_in_place()  # a copy of a moved run has the temporary directory as well
        self.store.commit(temporary, manifest)
        try:
            self.store.prune(self.config)
        except OSError as error:  # the checkpoint is committed nevertheless
            _log.warning("older checkpoints could not be removed: %s", error)
        if self._on_commit:
            self._on_commit()


def _on_gpu(shards: Mapping[str, Shard]) -> bool:
    return any(shard.local.device.type == "cuda" for shard in shards.values())


class _FailedError(Exception):
    """A part of the save failed on some rank; the text says which and why."""

    def __init__(self, text: str, *, may_retry: bool) -> None:
        super().__init__(text)
        self.may_retry = may_retry


def _reason(error: BaseException) -> tuple[str, bool]:
    """One line: the OSError in the chain of causes, if there is one, else the error itself; and
    whether the same save may succeed later."""
    cause: BaseException | None = error
    failures = getattr(error, "failures", None)  # DCP's CheckpointException: rank to error
    if failures:
        cause = next(iter(failures.values()))[0]
    root = cause
    while root is not None and not isinstance(root, OSError):
        root = root.__cause__ or root.__context__
    found = root or cause or error
    may_retry = isinstance(found, OSError | DamagedError | RetryError) or is_lost_peer(found)
    return f"{type(found).__name__}: {found}".splitlines()[0], may_retry
