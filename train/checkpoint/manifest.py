"""The manifest of a checkpoint: the size and SHA-256 of each file, and the state of the loop."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint.damage import NOT_A_FILE, DamagedError
from train.checkpoint.layout import dumps_with_sha256, json_sha256
from train.exits import UsageError
from train.files import is_plain_name, open_regular
from train.json_files import Fields, has_fields, is_count, is_number, parse_json, read_object, shown

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 22
_LIMIT = 1 << 28  # bytes
_FIELDS: Fields = {"step": int, "state": dict, "metrics": (dict, type(None)), "files": dict}
_ENTRY: Fields = {"size": int, "sha256": str}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint's ``manifest.json``."""

    step: int
    state: dict[str, Any]
    """State of the loop as JSON values: position, early stopping, step metrics ..."""
    metrics: dict[str, float] | None
    """Evaluation at this step, if there was one."""
    files: dict[str, dict[str, Any]]
    """Size in bytes and SHA-256 in hex of each file, by name."""

    @property
    def sha256(self) -> str:
        """The SHA-256 of itself that ``manifest.json`` has."""
        return json_sha256({"format": FORMAT, **vars(self)})

    def to_json(self) -> str:
        """The text of ``manifest.json``, with its own SHA-256 as the last key. Raises UsageError
        for a state that could not be read back."""
        text = dumps_with_sha256({"format": FORMAT, **vars(self)})
        try:
            if len(text) > _LIMIT:
                raise ValueError(f"it has {len(text)} bytes, and at most {_LIMIT} are read")
            parse_json(text)
        except ValueError as error:
            raise UsageError(
                f"The state of step {self.step}, such as what get_extra_state() returns, cannot be "
                f"stored ({error}); return large values as tensors."
            ) from None
        return text

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """Reads a checkpoint's manifest. Raises DamagedError if it is missing or damaged."""
        path = checkpoint / MANIFEST
        try:
            body = read_object(path, {"sha256": str}, limit=_LIMIT)
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing") from None
        except (*NOT_A_FILE, ValueError) as error:
            raise DamagedError(f"{path} cannot be read ({error})") from None
        if body.pop("sha256") != json_sha256(body):
            raise DamagedError(f"{path} does not match its own SHA-256")
        if body.pop("format", None) != FORMAT:
            raise DamagedError(f"{path} has a format that this version of isorun does not support")
        if fault := _fault(body):
            raise DamagedError(f"{path} does not have the content of a manifest ({fault})")
        return cls(**body)


def _fault(body: Mapping[str, Any]) -> str | None:
    """What is wrong with the keys and values of a manifest."""
    if body.keys() != _FIELDS.keys() or not has_fields(body, _FIELDS):
        return "its keys or their types"
    if not is_count(body["step"]):
        return "its step"
    for name, value in (body["metrics"] or {}).items():
        if not is_number(value):
            return f"the metric {shown(name)}"
    for name, entry in body["files"].items():
        if not is_plain_name(name) or name == MANIFEST:
            return f"the file name {shown(name)}"
        is_entry = has_fields(entry, _ENTRY) and is_count(entry["size"])
        if not is_entry or not _SHA256.fullmatch(entry["sha256"]):
            return f"the entry of {shown(name)}"
    return None


def hash_file(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a regular file."""
    digest, size = hashlib.sha256(), 0
    with os.fdopen(open_regular(path), "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}
