"""Checkpoints on disk, each committed by one rename.

A checkpoint is a directory ``step-<12 digits>`` with the files of ``torch.distributed.checkpoint``
and ``manifest.json``: the size and SHA-256 of each file and the state of the loop. It is written
under a temporary name, fsynced, then renamed. A directory with a temporary name is incomplete.
"""

from __future__ import annotations

import math
import shutil
import stat
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.checkpoint.checkpoint_config import CheckpointConfig
from train.checkpoint.damage import NOT_A_FILE, DamagedError, unusable
from train.checkpoint.index import DATA_SUFFIX, INDEX, PICKLED_INDEX, read_index
from train.checkpoint.layout import parse_step_name, step_name
from train.checkpoint.manifest import MANIFEST, Manifest, hash_file
from train.checkpoint.stored_tensor import check_tensors
from train.files import NotRegularError, fsync, refuse_link, replace_text

_TEMPORARY = ".writing-"
_PRIVATE = 0o700


class CheckpointStore:
    """The checkpoints of one run, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._readers = Counter[int]()
        self._reading = threading.Lock()

    def path(self, step: int) -> Path:
        """The directory of a step's checkpoint once it is committed."""
        return self.directory / step_name(step)

    @contextmanager
    def pinned(self, step: int) -> Iterator[None]:
        """While the context is entered, ``prune`` keeps the checkpoint of a step, because it is
        being read. In any thread, and by several readers at once."""
        with self._reading:
            self._readers[step] += 1
        try:
            yield
        finally:
            with self._reading:
                self._readers[step] -= 1

    def steps(self) -> list[int]:
        """The steps of all committed checkpoints, oldest first.

        Raises ResumeRefusedError if the directory of the checkpoints is a file or a link.
        """
        self._refuse_link()
        try:  # without a look before: another process may be making it
            names = [entry.name for entry in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        except NotADirectoryError as error:
            raise unusable(self.directory, error) from error
        steps = (parse_step_name(name) for name in names)
        return sorted(step for step in steps if step is not None)

    def _refuse_link(self) -> None:
        try:
            refuse_link(self.directory)
        except OSError as error:
            raise unusable(self.directory, error) from error

    def begin(self, step: int) -> Path:
        """Creates a temporary directory for the checkpoint of a step. Only its owner can write into
        it before the commit: in a run directory of a group, somebody else could otherwise put a
        link where a file is about to be written."""
        self._refuse_link()
        temporary = self.directory / f"{_TEMPORARY}{step:012d}-{uuid.uuid4().hex[:8]}"
        if not self.directory.exists():
            self.directory.mkdir()  # never a new run directory, in place of one that was moved
            fsync(self.directory.parent)
        temporary.mkdir(_PRIVATE)
        return temporary

    def commit(self, temporary: Path, manifest: Manifest) -> Path:
        """Writes the manifest, fsyncs all files and renames the directory to its final name."""
        path = temporary / MANIFEST
        path.write_text(manifest.to_json(), encoding="utf-8")
        for name in manifest.files:
            fsync(temporary / name)
        fsync(path)
        self._share(temporary)
        fsync(temporary)
        final = self.path(manifest.step)
        temporary.rename(final)
        fsync(self.directory)
        return final

    def _share(self, directory: Path) -> None:
        """Gives others the access that they have to the directory of all checkpoints."""
        others = self.directory.stat().st_mode & ~_PRIVATE & 0o777
        with suppress(OSError):  # the file system has no modes, or fixed ones
            directory.chmod(stat.S_IMODE(directory.stat().st_mode) | others)

    def amend(self, step: int, state: Mapping[str, Any], metrics: dict[str, float]) -> None:
        """Adds a later evaluation of the step to the manifest of a committed checkpoint."""
        path = self.path(step) / MANIFEST
        manifest = Manifest.read(self.path(step))
        amended = replace(manifest, state={**manifest.state, **state}, metrics=metrics)
        replace_text(path, amended.to_json())

    def remove_incomplete(self) -> list[str]:
        """Removes the directories of interrupted saves; returns their names."""
        self._refuse_link()
        if not self.directory.is_dir():
            return []
        leftovers = [e for e in self.directory.iterdir() if e.name.startswith(_TEMPORARY)]
        for entry in leftovers:
            shutil.rmtree(entry, ignore_errors=True)
        return [entry.name for entry in leftovers]

    def problems(self, step: int) -> list[str]:
        """Verifies a committed checkpoint: size and SHA-256 of each file, that its index names
        only these files, and that its tensors are not compressed. Returns the faults, [] if valid.

        Raises OSError if the storage fails, since the checkpoint may then be valid.
        """
        checkpoint = self.path(step)
        try:
            refuse_link(checkpoint)
            manifest = Manifest.read(checkpoint)
        except NotRegularError as error:
            return [f"{checkpoint} cannot be used ({error.strerror})"]
        except DamagedError as error:
            return [str(error)]
        found = _unnamed(checkpoint, manifest)
        if manifest.step != step:
            found.append(f"{checkpoint / MANIFEST} belongs to step {manifest.step}")
        for name, expected in manifest.files.items():
            try:
                actual = hash_file(checkpoint / name)
            except NOT_A_FILE as error:
                found.append(f"{checkpoint / name} cannot be read ({error.strerror})")
                continue
            if actual["size"] != expected["size"]:
                found.append(
                    f"{checkpoint / name} has {actual['size']} bytes instead of {expected['size']}"
                )
            elif actual["sha256"] != expected["sha256"]:
                found.append(f"{checkpoint / name} does not match its SHA-256")
        if not found:
            try:
                index = read_index(checkpoint, manifest.files)
                chunks = (chunk for tensor in index.values() for chunk in tensor.chunks)
                check_tensors(checkpoint, ((c.file, c.at, c.length) for c in chunks))
            except DamagedError as error:
                found.append(str(error))
        return found

    def quarantine(self, step: int) -> Path:
        """Renames a damaged checkpoint to ``damaged-...``, so that it is kept but not used."""
        source = self.path(step)
        target = self.directory / f"damaged-{source.name}-{uuid.uuid4().hex[:8]}"
        source.rename(target)
        return target

    def newest_valid(
        self, check: Callable[[Path], object] = lambda _: None
    ) -> tuple[int | None, list[str]]:
        """The step of the newest valid checkpoint (None without one), and messages for the user.

        Removes incomplete checkpoints and quarantines damaged ones; also those for which ``check``
        raises DamagedError.
        """
        notes = []
        if removed := self.remove_incomplete():
            notes.append(f"Removed {len(removed)} incomplete checkpoint(s) of an interrupted save.")
        for step in reversed(self.steps()):
            problems = self.problems(step)
            try:
                if not problems:
                    check(self.path(step))
                    return step, notes
            except DamagedError as error:
                problems = [str(error)]
            quarantined = self.quarantine(step)
            notes.append(
                f"The checkpoint of step {step} is damaged ({'; '.join(problems)}); renamed it to "
                f"{quarantined.name}."
            )
        if notes:
            notes.append("There is no valid checkpoint, so the run starts from the beginning.")
        return None, notes

    def metrics(self) -> dict[int, dict[str, float]]:
        """The evaluations of the committed checkpoints that have one, by step."""
        found = {}
        for step in self.steps():
            try:
                metrics = Manifest.read(self.path(step)).metrics
            except DamagedError:
                continue
            if metrics:
                found[step] = metrics
        return found

    def best(self, metric: str, mode: str) -> list[int]:
        """Steps with a finite value of the metric, best first; the newer first if equal."""
        sign = 1.0 if mode == "min" else -1.0
        values = {
            step: sign * metrics[metric]
            for step, metrics in self.metrics().items()
            if metric in metrics and math.isfinite(metrics[metric])
        }
        return sorted(values, key=lambda step: (values[step], -step))

    def prune(self, config: CheckpointConfig) -> list[int]:
        """Removes the checkpoints that the config does not keep; returns their steps.

        Call it after a commit. The newest checkpoint is always kept.
        """
        steps = self.steps()
        with self._reading:
            keep = set(steps[-config.keep_last :]) | {*(+self._readers)}
        if config.keep_every_steps:
            keep |= {step for step in steps if step % config.keep_every_steps == 0}
        if config.keep_best:
            best = self.best(config.keep_best.metric, config.keep_best.mode)
            keep |= set(best[: config.keep_best.keep])
        return self._remove(step for step in steps if step not in keep)

    def _remove(self, steps: Iterable[int]) -> list[int]:
        removed = []
        for step in steps:
            # Rename first: a partially removed directory must not look like a damaged checkpoint.
            doomed = self.directory / f"{_TEMPORARY}removing-{step:012d}-{uuid.uuid4().hex[:8]}"
            self.path(step).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            removed.append(step)
        return removed


def _unnamed(checkpoint: Path, manifest: Manifest) -> list[str]:
    """The faults of files with data that the manifest does not name. Other files are ignored, such
    as those that a file system or a file manager creates."""
    return [
        f"{entry} is not in {checkpoint / MANIFEST}"
        for entry in sorted(checkpoint.iterdir())
        if entry.name not in manifest.files
        and (entry.suffix == DATA_SUFFIX or entry.name in (INDEX, PICKLED_INDEX))
    ]
