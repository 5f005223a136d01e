"""A checkpoint that an artifact does not hold, but refers to.

Whoever has made the artifact chooses its references, so that few are followed: all must lead to one
checkpoint, a directory ``step-N`` of this machine (``file://``) or a mirror's copy (``file://``,
``s3://``, ``gs://``). What is there counts only with its hashes, and it is copied.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from train.artifacts.fetch import Listing
from train.checkpoint.checkpoint_config import MirrorConfig
from train.checkpoint.damage import DamagedError
from train.checkpoint.layout import parse_step_name, step_name
from train.checkpoint.manifest import MANIFEST, Manifest
from train.checkpoint.mirror import Mirror, MirrorError
from train.checkpoint.received import RUN, RUN_FILES
from train.checkpoint.store import CheckpointStore
from train.exits import RetryError, UsageError
from train.files import create, open_regular, refuse_link
from train.json_files import shown

_URL = re.compile(r"(?P<base>(?:file|s3|gs)://[^?#]+)/(?P<step>step-[0-9]{12})(?:/[^/]+)?/?")
_BLOCK = 4 << 20


class Place(NamedTuple):
    """Where a checkpoint is: in the folder ``step-N`` of a URL."""

    base: str
    step: int


def is_of_checkpoint(url: str) -> bool:
    """Whether a reference leads to what may be a checkpoint."""
    return _URL.fullmatch(url) is not None


def referred_place(listing: Listing, where: str) -> Place | None:
    """The one checkpoint that all references lead to; None without references. Raises UsageError
    for others."""
    places: set[Place] = set()
    # Those of the run itself come last: their place follows from that of the checkpoint.
    of_run = {f"{RUN}/{name}": name for name in RUN_FILES}
    for name, url in sorted(listing.references.items(), key=lambda item: item[0] in of_run):
        if name in of_run and any(url == f"{_run_of(p)}/{of_run[name]}" for p in places):
            continue
        match = _URL.fullmatch(url)
        step = parse_step_name(match["step"]) if match else None
        if match is None or step is None or ".." in url.split("/"):
            raise UsageError(
                f"{where}, whose {name} refers to {shown(url)}, which is not followed: "
                "references may lead to a checkpoint (file:///RUN/checkpoints/step-N) or to a "
                "mirror's copy (s3://bucket/folder/step-N); name another artifact, or get the file "
                "yourself and name its path."
            )
        places.add(Place(match["base"], step))
    if len(places) > 1:
        raise UsageError(f"{where}, which refers to several checkpoints; name another artifact.")
    return places.pop() if places else None


def _run_of(place: Place) -> str:
    return place.base.removesuffix("/checkpoints")


def copy_checkpoint(place: Place, files: Path, where: str) -> None:
    """Copies the checkpoint of a place into the directory ``files``, where there may be a part of
    it, such as its manifest. Raises DamagedError if it is another one or is damaged, UsageError if
    it is not there, and RetryError if the storage fails."""
    known = Manifest.read(files) if (files / MANIFEST).exists() else None
    url = f"{place.base}/{step_name(place.step)}"
    directory = _local(url)
    try:
        if directory and (directory / MANIFEST).exists():
            refuse_link(directory)
            _copy_directory(directory, files, known)
        else:
            _copy_mirrored(place, files, where)
    except FileNotFoundError as error:
        raise UsageError(
            f"{where}, which refers to {url}, but {error.filename} is not there; name another "
            "version, or restore the file."
        ) from None
    except MirrorError as error:
        kind = UsageError if error.is_misconfigured else RetryError
        raise kind(f"{where}, which refers to {url}, which cannot be read ({error}); correct its "
                   "rights or its storage, then rerun.") from error  # fmt: skip
    if known and known.files != Manifest.read(files).files:
        raise DamagedError(f"{url} is not the checkpoint that the artifact has the manifest of")


def _local(url: str) -> Path | None:
    return Path(unquote(url.removeprefix("file://"))) if url.startswith("file:///") else None


def _copy_directory(directory: Path, files: Path, known: Manifest | None) -> None:
    manifest = known or Manifest.read(directory)
    if known is None:
        (files / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    for name, entry in manifest.files.items():
        if not (files / name).exists():
            _copy(directory / name, files / name, entry["size"], entry["sha256"])
    if directory.parent.name != "checkpoints":
        return
    (files / RUN).mkdir(exist_ok=True)
    for name in RUN_FILES:
        source, target = directory.parents[1] / name, files / RUN / name
        if source.exists() and not target.exists():
            with os.fdopen(open_regular(source), "rb") as old, target.open("xb") as new:
                shutil.copyfileobj(old, new)


def _copy(source: Path, target: Path, size: int, sha256: str) -> None:
    """Copies a regular file of this size and SHA-256. Raises DamagedError for another."""
    digest = hashlib.sha256()
    with (
        os.fdopen(open_regular(source), "rb") as old,
        os.fdopen(create(target), "wb") as new,
    ):
        if os.fstat(old.fileno()).st_size != size:
            raise DamagedError(f"{source} does not have the size that the manifest lists")
        while block := old.read(min(_BLOCK, size)):
            digest.update(block)
            new.write(block)
            size -= len(block)
    if digest.hexdigest() != sha256:
        raise DamagedError(f"{source} does not match its SHA-256")


def _copy_mirrored(place: Place, files: Path, where: str) -> None:
    run = files.parent / "mirror"
    run.mkdir()
    mirror = Mirror(MirrorConfig(url=place.base), f"{where}, which refers to")
    store = CheckpointStore(run / "checkpoints")
    if place.step not in mirror.steps():
        raise FileNotFoundError(2, "missing", f"{place.base}/{step_name(place.step)}")
    mirror.download(place.step, store)
    (files / RUN).mkdir(exist_ok=True)
    for source, target in (
        *((path, files / path.name) for path in store.path(place.step).iterdir()),
        *((run / name, files / RUN / name) for name in RUN_FILES if (run / name).exists()),
    ):
        if not target.exists():
            source.rename(target)
