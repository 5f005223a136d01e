"""The data files of a checkpoint that an artifact does not hold, but refers to.

Whoever has made the artifact chooses its references, so that few are followed: all must lead to one
checkpoint, a directory ``step-N`` of this machine (``file://``) or a mirror's copy (``file://``,
``s3://``, ``gs://``). What is there is copied, if it has the hashes of the manifest that W&B has.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from train.checkpoint.checkpoint_config import MirrorConfig
from train.checkpoint.damage import DamagedError
from train.checkpoint.layout import parse_step_name, step_name
from train.checkpoint.manifest import MANIFEST, Manifest
from train.checkpoint.mirror import Mirror, MirrorError
from train.checkpoint.store import CheckpointStore
from train.exits import RetryError, UsageError
from train.files import create, open_regular, refuse_link
from train.json_files import shown

_URL = re.compile(r"(?P<base>(?:file|s3|gs)://[^?#]+)/(?P<step>step-[0-9]{12})/[^/?#]+")
_BLOCK = 4 << 20


class Place(NamedTuple):
    """Where a checkpoint is: in the folder ``step-N`` of a URL."""

    base: str
    step: int

    @property
    def url(self) -> str:
        """The URL of the folder."""
        return f"{self.base}/{step_name(self.step)}"


def referred_place(references: Mapping[str, str], where: str) -> Place | None:
    """The one checkpoint that all references (URLs by name) lead to; None without references.
    Raises UsageError for others."""
    places: set[Place] = set()
    for name, url in references.items():
        match = _URL.fullmatch(url)
        step = parse_step_name(match["step"]) if match else None
        if match is None or step is None or ".." in unquote(url).split("/"):
            raise UsageError(
                f"{where}, whose {name} refers to {shown(url)}, which is not followed: references "
                "may lead to a checkpoint (file:///RUN/checkpoints/step-N) or to a mirror's copy "
                "(s3://bucket/folder/step-N); name another artifact."
            )
        places.add(Place(match["base"], step))
    if len(places) > 1:
        raise UsageError(f"{where}, which refers to several checkpoints; name another artifact.")
    return places.pop() if places else None


def copy_checkpoint(place: Place, files: Path, where: str) -> None:
    """Copies the data of the checkpoint of a place into the directory ``files``, which has its
    manifest. Raises DamagedError if other data is there, UsageError if none is, and RetryError if
    the storage fails."""
    manifest = Manifest.read(files)
    directory = _local(place.url)
    try:
        if directory and (directory / MANIFEST).exists():
            refuse_link(directory)
            for name, entry in manifest.files.items():
                _copy(directory / name, files / name, entry["size"], entry["sha256"])
        else:
            _copy_mirrored(place, manifest, files, where)
    except FileNotFoundError as error:
        raise UsageError(
            f"{where}, whose data W&B does not have, and it is no longer at {place.url} "
            f"({error.filename}); name another version, or restore it there."
        ) from None
    except MirrorError as error:
        kind = UsageError if error.is_misconfigured else RetryError
        raise kind(
            f"{where}, which refers to {place.url}, which cannot be read ({error}); fix the cause, "
            "then rerun."
        ) from error


def _local(url: str) -> Path | None:
    return Path(unquote(url.removeprefix("file://"))) if url.startswith("file:///") else None


def _copy(source: Path, target: Path, size: int, sha256: str) -> None:
    """Copies a regular file of this size and SHA-256. Raises DamagedError for another."""
    digest = hashlib.sha256()
    with (
        os.fdopen(open_regular(source), "rb") as old,
        os.fdopen(create(target), "wb") as new,
    ):
        if os.fstat(old.fileno()).st_size != size:
            raise DamagedError(f"{source} does not have the size that {MANIFEST} lists")
        left = size
        while left and (block := old.read(min(_BLOCK, left))):
            digest.update(block)
            new.write(block)
            left -= len(block)
    if digest.hexdigest() != sha256:
        raise DamagedError(f"{source} does not match its SHA-256")


def _copy_mirrored(place: Place, manifest: Manifest, files: Path, where: str) -> None:
    run = files.parent / "mirror"
    run.mkdir()
    mirror = Mirror(MirrorConfig(url=place.base), f"{where}, which refers to")
    if place.step not in mirror.steps():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), step_name(place.step))
    store = CheckpointStore(run / "checkpoints")
    mirror.download(place.step, store)
    copy = store.path(place.step)
    if Manifest.read(copy).files != manifest.files:
        raise DamagedError(f"{place.url} is another checkpoint than {MANIFEST} describes")
    for name in manifest.files:
        (copy / name).rename(files / name)
