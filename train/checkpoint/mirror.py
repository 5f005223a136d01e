"""A mirror: copies of committed checkpoints at another URL, such as an object store.

The mirror's URL holds ``run.json``, the id of the run that owns it, and a folder per checkpoint:
its files and those of the run directory, split into parts, and ``mirror.json``, which lists the
parts and commits the copy. A folder without ``mirror.json`` is ignored. A part's name ends in its
SHA-256, so an interrupted upload resumes; every part is read back before ``mirror.json`` is
written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.damage import DamagedError
from train.checkpoint.layout import dumps_with_sha256, json_sha256, parse_step_name, step_name
from train.checkpoint.manifest import MANIFEST, Manifest
from train.checkpoint.mirror_storage import described, is_misconfigured, open_storage
from train.checkpoint.received import OWNER, RUN, RUN_FILES, check_is_of, install, run_id_in
from train.checkpoint.store import CheckpointStore
from train.exits import ResumeRefusedError
from train.files import create, is_plain_name, open_regular
from train.json_files import LIMIT, Fields, has_fields, parse_object, shown

if TYPE_CHECKING:
    from train.checkpoint.checkpoint_config import MirrorConfig

INDEX = "mirror.json"
_RUN = f"{RUN}/"
_FORMAT = 1
_LARGEST_PART = 16 << 30  # bytes
_INDEX: Fields = {"format": int, "step": int, "files": dict, "sha256": str}
_PART: Fields = {"key": str, "size": int, "sha256": str}


class MirrorError(Exception):
    """The mirror cannot be reached or refuses an operation; the text is one line."""

    is_misconfigured = False
    """Whether a retry cannot help, because credentials or rights are missing, or a file is of the
    wrong kind."""


class Mirror:
    """The mirror's storage. Turns every error of the storage into a MirrorError."""

    def __init__(self, config: MirrorConfig, field: str = "checkpoint.mirror.url is") -> None:
        """``field`` begins the message for a URL that cannot be used."""
        self.url = config.url.rstrip("/")
        self._part_size = config.part_mb << 20
        self.storage = open_storage(self.url, config.options, field)

    # -- owner -------------------------------------------------------------------------------

    def owner(self) -> str | None:
        """The id of the run that owns the mirror; None without an owner."""
        data = self._get(OWNER, LIMIT)
        if data is None:
            return None
        try:
            return str(parse_object(data, {"id": str})["id"])
        except ValueError:  # a crash may have cut it off
            return None

    def claim(self, run_id: str) -> None:
        """Makes the run the owner. Raises ResumeRefusedError if another run's checkpoints are
        there."""
        owner = self.owner()
        if owner == run_id:
            return
        if owner is None or not self.steps():
            self._put(OWNER, json.dumps({"id": run_id}).encode())
        else:
            raise ResumeRefusedError(
                f"checkpoint.mirror.url is {self.url}, which holds the checkpoints of the run "
                f"{owner}, but this is the run {run_id}; set a separate URL for each run."
            )

    # -- upload ------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The steps of all committed copies, oldest first."""
        steps = map(parse_step_name, self._call(self.storage.folders, INDEX))
        return sorted(step for step in steps if step is not None)

    def upload(
        self, store: CheckpointStore, step: int, should_continue: Callable[[], bool]
    ) -> None:
        """Uploads the missing parts of a checkpoint, reads them back, and commits the copy.

        Raises MirrorError once ``should_continue``, called before each part, returns false, and
        DamagedError for a checkpoint of another run or step.
        """
        folder, path = step_name(step), store.path(step)
        manifest = Manifest.read(path)
        check_is_of(manifest, path / MANIFEST, step, run_id_in(store.directory.parent / OWNER))
        files = {name: path / name for name in (*manifest.files, MANIFEST)}
        run = store.directory.parent
        files |= {_RUN + name: run / name for name in RUN_FILES if (run / name).exists()}
        index: dict[str, list[dict[str, Any]]] = {}
        for name, file in files.items():
            index[name], whole = [], hashlib.sha256()
            for number, part in enumerate(self._parts(file)):
                if not should_continue():
                    raise MirrorError("the run has ended")
                digest = hashlib.sha256(part).hexdigest()
                whole.update(part)
                key = f"{folder}/{name}.{number:05d}-{digest}"
                if self._get(key, len(part)) != part:
                    self._put(key, part)
                    if self._get(key, len(part)) != part:
                        raise MirrorError(f"{key} differs when read back")
                index[name].append({"key": key, "size": len(part), "sha256": digest})
            if name in manifest.files and whole.hexdigest() != manifest.files[name]["sha256"]:
                raise DamagedError(f"{file} does not match its SHA-256")
        body = {"format": _FORMAT, "step": step, "files": index}
        self._put(f"{folder}/{INDEX}", dumps_with_sha256(body).encode())

    def remove(self, step: int) -> None:
        """Removes a copy, ``mirror.json`` first, so that a partial removal is not a valid copy."""
        folder = step_name(step)
        self._call(self.storage.remove, f"{folder}/{INDEX}")
        self._call(self.storage.remove_folder, folder)

    # -- download ----------------------------------------------------------------------------

    def download(
        self, step: int, store: CheckpointStore, check: Callable[[Path], object] = lambda _: None
    ) -> None:
        """Downloads a checkpoint and commits it, and the files of the run directory that are
        missing.

        ``check`` gets the checkpoint before anything of it is installed, with the files of the run
        in its directory ``run``, and may change these. Raises DamagedError if a part is missing or
        differs from what was uploaded, or if the checkpoint is of another run or step; and what
        ``check`` raises.
        """
        files = self._index(step)
        temporary = store.begin(step)
        (temporary / _RUN).mkdir()
        received = {}
        for name, parts in files.items():
            whole = hashlib.sha256()
            with os.fdopen(create(temporary / name), "wb") as file:
                for part in parts:
                    data = self._get(part["key"], part["size"])
                    if data is None or hashlib.sha256(data).hexdigest() != part["sha256"]:
                        raise DamagedError(f"{self.url}/{part['key']} is missing or damaged")
                    file.write(data)
                    whole.update(data)
            received[name] = whole.hexdigest()
        install(store, temporary, step, received, self.url, check)

    def _index(self, step: int) -> dict[str, list[dict[str, Any]]]:
        """The parts of each file of a copy, from its ``mirror.json``. Raises DamagedError."""
        folder = step_name(step)
        path = f"{self.url}/{folder}/{INDEX}"
        try:
            index = parse_object(self._get(f"{folder}/{INDEX}", LIMIT) or b"", _INDEX)
        except ValueError as error:
            raise DamagedError(f"{path} cannot be read ({error})") from None
        if index.pop("sha256") != json_sha256(index) or index["format"] != _FORMAT:
            raise DamagedError(f"{path} does not match its own SHA-256")
        if index["step"] != step:
            raise DamagedError(f"{path} is of step {index['step']}, not of step {step}")
        for name, parts in index["files"].items():
            plain = name.removeprefix(_RUN)
            of_run = plain != name
            if not is_plain_name(plain) or (plain not in RUN_FILES if of_run else plain == "run"):
                raise DamagedError(f"{path} names {shown(name)}, which is no file of a checkpoint")
            if not isinstance(parts, list) or not all(map(_is_part, parts)):
                raise DamagedError(f"{path} does not have the parts of {shown(name)}")
            for part in parts:
                prefix = f"{folder}/{_RUN if of_run else ''}"
                is_inside = part["key"].startswith(prefix)
                if not is_inside or not is_plain_name(part["key"].removeprefix(prefix)):
                    raise DamagedError(f"{path} names {shown(part['key'])}, which is not its part")
        files: dict[str, list[dict[str, Any]]] = index["files"]
        return files

    # -- storage -----------------------------------------------------------------------------

    def _parts(self, file: Path) -> Iterator[bytes]:
        with os.fdopen(open_regular(file), "rb") as stream:
            while part := stream.read(self._part_size):
                yield part

    def _get(self, key: str, size: int) -> bytes | None:
        found: bytes | None = self._call(self.storage.read, key, size)
        return found

    def _put(self, key: str, data: bytes) -> None:
        self._call(self.storage.write, key, data)

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except Exception as error:
            raise _failed(error) from error


def _is_part(part: object) -> bool:
    return has_fields(part, _PART) and 0 <= part["size"] <= _LARGEST_PART


def _failed(error: Exception) -> MirrorError:
    failed = MirrorError(described(error))
    failed.is_misconfigured = is_misconfigured(error)
    return failed
