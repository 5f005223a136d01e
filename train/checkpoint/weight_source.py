"""Finds the weights that ``init_from.source`` names, and checks them before they are used.

Which kind a source is follows from what is there: a directory with checkpoints is a run, one with
``manifest.json`` a checkpoint, one with ``model.safetensors`` or an index of several such files an
export or a model of Hugging Face. A text with ``://`` is the URL of a mirror, whose copy is
downloaded into the run directory and then is a run directory like any other. Artifacts of W&B
come through :mod:`train.artifacts.weights`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from train.checkpoint import dcp
from train.checkpoint.checkpoint_config import MirrorConfig
from train.checkpoint.damage import DamagedError
from train.checkpoint.layout import json_sha256, parse_step_name
from train.checkpoint.manifest import MANIFEST, Manifest, hash_file
from train.checkpoint.mirror import Mirror, MirrorError
from train.checkpoint.opening import fault_of_run
from train.checkpoint.store import CheckpointStore
from train.checkpoint.weight_files import (
    INDEX,
    PARAMETERS,
    TORCH_SUFFIXES,
    entries_of,
    indexed_files,
    read_into,
)
from train.checkpoint.weight_match import Entry
from train.distributed.shard import is_extra_state
from train.exits import DataError, ResumeRefusedError, RetryError, UsageError, first_line
from train.files import refuse_link
from train.paths import user_path
from train.process.diagnose import is_fault_of_machine
from train.suggest import listed

if TYPE_CHECKING:
    from train.distributed.shard import Shard

_MODEL = "model."
_KINDS = (
    "a run directory, a checkpoint (RUN/checkpoints/step-N), an export or another directory with "
    f"{PARAMETERS} or {INDEX}, a .safetensors, .pt, .pth or .bin file, the URL of a mirror, or "
    "wandb:ENTITY/PROJECT/NAME:ALIAS"
)


@dataclass(frozen=True)
class WeightSource:
    """Weights that were found and checked, the same on all ranks."""

    path: Path
    """The checkpoint, or the directory of the files."""
    entries: dict[str, Entry]
    """The tensors that a model can take, by name."""
    files: dict[str, str]
    """The file of each of them, by name; empty for a checkpoint."""
    sha256: str
    """Of the hashes of the files, which the manifest has for a checkpoint."""
    step: int | None
    """That of a checkpoint."""
    run: str | None
    """The id of the run that wrote a checkpoint, if it is known."""
    has_extra_state: bool
    """Whether it also has what modules return from ``get_extra_state``, which is not loaded."""
    artifact: str | None = None
    """The artifact of W&B that it was downloaded from: ``entity/project/name:version``."""

    def load(self, targets: Mapping[str, Shard], group: Any) -> None:
        """Fills this rank's shards, by the names of ``entries``; collective over ``group`` for a
        checkpoint. Raises DamagedError and OSError."""
        if not self.files:
            dcp.load({_MODEL + name: shard for name, shard in targets.items()}, self.path, group)
            return
        by_file: dict[str, dict[str, Shard]] = {}
        for name, shard in targets.items():
            by_file.setdefault(self.files[name], {})[name] = shard
        for file, shards in by_file.items():
            read_into(self.path / file, shards)

    def is_visible(self) -> bool:
        """Whether this process sees the files."""
        names = set(self.files.values()) or {MANIFEST}
        return all((self.path / name).exists() for name in names)


def find_source(source: str, start: Path, download: Path, where: str) -> WeightSource:
    """The checked weights of ``init_from.source``. A relative path starts at ``start``; a mirror's
    copy is downloaded into the directory ``download``, which is made. ``where`` begins messages:
    field, value and origin.

    Raises UsageError where there are no weights of a known kind, DataError where they are damaged,
    and RetryError where the storage fails.
    """
    path: Path = start
    try:
        if "://" in source:
            return _of_mirror(source, download, where)
        path = start / user_path(source, where)
        return _of_path(path, where)
    except DamagedError as error:
        raise DataError(f"{where}, which cannot be used: {error}; name another source.") from None
    except ResumeRefusedError as error:  # of the run directory that is the source
        raise DataError(
            f"{where}, whose run directory cannot be used: {str(error).partition(';')[0]}; name "
            "another source."
        ) from None
    except OSError as error:
        fault = f"{error.filename or path} cannot be read ({error.strerror or first_line(error)})"
        if is_fault_of_machine(error):
            raise RetryError(f"{where}, but {fault}; fix the cause, then rerun.") from error
        raise UsageError(
            f"{where}, but {fault}; correct the path, its kind or its rights."
        ) from None


def _of_path(path: Path, where: str) -> WeightSource:
    if not path.exists():
        raise UsageError(f"{where}, but there is no such file or directory; name {_KINDS}.")
    if not path.is_dir():
        return _of_file(path, where)
    checkpoints = path / "checkpoints"
    has_files = (path / PARAMETERS).exists() or (path / INDEX).exists()
    if (path / "run.json").exists() or (checkpoints.is_dir() and not has_files):
        refuse_link(checkpoints)
        steps = CheckpointStore(checkpoints).steps()
        if not steps:
            raise UsageError(
                f"{where}, a run directory without a committed checkpoint; name one that has one, "
                "or another kind of source."
            )
        return _of_checkpoint(CheckpointStore(checkpoints).path(steps[-1]), where)
    if (path / MANIFEST).exists() and not has_files:
        return _of_checkpoint(path, where)
    if (path / PARAMETERS).exists():
        return _of_files(path, dict.fromkeys(entries_of(path / PARAMETERS), PARAMETERS))
    if (path / INDEX).exists():
        return _of_files(path, indexed_files(path / INDEX))
    raise UsageError(
        f"{where}, a directory without a checkpoint, {PARAMETERS} or {INDEX}; name {_KINDS}."
    )


def _of_file(path: Path, where: str) -> WeightSource:
    if path.name.endswith(".safetensors.index.json"):
        return _of_files(path.parent, indexed_files(path))
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise UsageError(f"{where}, a file of an unknown kind; name {_KINDS}.")
    return _of_files(path.parent, dict.fromkeys(entries_of(path), path.name))


def _of_files(directory: Path, files: dict[str, str]) -> WeightSource:
    """``files``: the file of each tensor, by its name."""
    names = sorted(set(files.values()))
    found = {name: entries_of(directory / name) for name in names}
    if absent := [name for name, file in files.items() if name not in found[file]]:
        raise DamagedError(
            f"{directory / INDEX} has {listed(absent, 3)}, which {files[absent[0]]} lacks"
        )
    own = {name: file for name, file in files.items() if not is_extra_state(name)}
    if not own:
        raise DamagedError(f"{directory / listed(names, 1)} has no tensors")
    hashes = {name: hash_file((directory / name).resolve()) for name in names}
    alone = next(iter(hashes.values()))["sha256"]
    return WeightSource(
        path=directory,
        entries={name: found[file][name] for name, file in own.items()},
        files=own,
        sha256=alone if len(hashes) == 1 else json_sha256(hashes),
        step=None,
        run=None,
        has_extra_state=len(own) < len(files),
    )


def _of_checkpoint(path: Path, where: str) -> WeightSource:
    step = parse_step_name(path.name)
    if step is None:
        raise UsageError(
            f"{where}, but the name of a committed checkpoint is step-<12 digits>; name another, "
            "or rename a copy."
        )
    faults = CheckpointStore(path.parent).problems(step)
    if faults and not path.exists():
        raise RetryError(
            f"{where}, but {path} was removed while it was read; rerun, or name a checkpoint that "
            "its run keeps."
        )
    if fault := listed(faults, 3, separator="; ") or fault_of_run(path):
        raise DataError(
            f"{where}, but its checkpoint {path.name} is damaged ({fault}); name another "
            "checkpoint, RUN/checkpoints/step-N."
        )
    manifest, index = Manifest.read(path), dcp.read_index(path)
    entries = {
        name.removeprefix(_MODEL): Entry(tensor.shape, tensor.dtype)
        for name, tensor in index.items()
        if name.startswith(_MODEL) and not is_extra_state(name)
    }
    run = manifest.state.get("run")
    return WeightSource(
        path=path,
        entries=entries,
        files={},
        # A later evaluation of the step changes the manifest, but not its list of files.
        sha256=json_sha256(manifest.files),
        step=step,
        run=run if isinstance(run, str) else None,
        has_extra_state=bool(manifest.state.get("extra_state")),
    )


def _of_mirror(url: str, download: Path, where: str) -> WeightSource:
    """Downloads the newest copy of a mirror, or that of the step that ends the URL, with the checks
    of a restore, and checks it like any checkpoint."""
    base, _, last = url.rstrip("/").rpartition("/")
    step = parse_step_name(last) if "://" in base else None
    try:
        config = MirrorConfig(url=url if step is None else base)
    except ValidationError:
        raise UsageError(
            f"{where}, which names no folder; write the URL of one, such as s3://bucket/folder or "
            "file:///folder."
        ) from None
    mirror = Mirror(config, "init_from.source is")
    try:
        steps = mirror.steps()
        if not steps or step not in (None, *steps):
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise UsageError(f"{where}, but {mirror.url} is a mirror with {which}; name another.")
        step = steps[-1] if step is None else step
        download.mkdir(mode=0o700)
        store = CheckpointStore(download / "checkpoints")
        mirror.download(step, store)
    except MirrorError as error:
        if error.is_misconfigured:
            raise UsageError(
                f"{where}, which cannot be read ({error}); correct its credentials and rights, or "
                "the kind of its files."
            ) from error
        raise RetryError(f"{where}, which cannot be read ({error}); rerun when it can.") from error
    return _of_checkpoint(store.path(step), where)


def remove_download(directory: Path) -> None:
    """Removes the directory of a download, also one that a killed attempt has left."""
    refuse_link(directory)
    if directory.exists():
        shutil.rmtree(directory)
